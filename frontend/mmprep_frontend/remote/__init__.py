"""The door for backends on other hosts: a process of its own, for the writer as many ordinary backends."""
