"""Upgrades of populated databases of released versions.

    v0_1_0/dump.sql    a database of the release: a few hundred payments in all states, and what lies around them
    v0_1_0/calls.py    how the processes of the release call its functions
    population         fills a database of this version, for the dump of the next release
    dumps              writes and loads dumps
    rolling            old and new processes beside each other: `python -m tests.upgrades --from REVISION --json`

A dump never changes once its version is released. `python -m tests.upgrades dump FOLDER` writes a new one.
"""
