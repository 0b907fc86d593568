"""Imports of files into the database, in one transaction each: a file is stored as a whole or not at all."""
