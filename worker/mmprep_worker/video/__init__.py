"""Videos: what kind a file is, what its headers may claim, which frames are taken, and their pixels one by one."""
