"""Items that were processed elsewhere: read, checked against the model card, put into the cache."""
