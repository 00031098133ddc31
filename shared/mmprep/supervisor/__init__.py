"""``mmprep serve``: the process that starts, watches and stops the others, and speaks for all of them."""
