"""NACHA files: 94 characters a record, read and written from one table of fields.

fields.py       the table: each kind of record, each of its 94 positions
codes.py        entry classes, transaction codes, service classes
dated_rules.py  same-day windows and limits, company entry descriptions: each with its first day and its source
lines.py        bytes to records of 94 characters
checks.py       what must hold of one record and of one entry
reader.py       a file to entries and batches, with every error (strict) or as warnings (patient)
writer.py       entries to a file

Entries are streamed both ways, so memory does not grow with the file. Account numbers appear in no error.
"""
