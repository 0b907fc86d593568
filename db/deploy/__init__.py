"""`surety deploy`: the files of a version, split into statements, and the way they reach a database."""
