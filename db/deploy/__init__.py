"""`surety deploy`: brings a database to a version.

source.py      the files of a version          statements.py   splits them into statements
inventory.py   what the database has           deploy.py       applies what it lacks
bookkeeping.sql  the record of deploys
"""
