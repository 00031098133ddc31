"""Media intake: which URLs may be read, reading them, and what identifies their content."""
