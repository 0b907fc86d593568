"""Formats of files that banks exchange with us: what they contain, without a database and without a network."""
