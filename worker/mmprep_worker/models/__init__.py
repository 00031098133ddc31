"""Model families: one file each, and the generic one."""
