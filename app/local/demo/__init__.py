"""`surety demo`: everything as real processes on this machine, misbehaving from a seed, and what became of it.

stage       the folder, the database, the processes, and their end, however it comes
merchants   the traffic: payments over HTTP, acknowledged or not
report      what the database and the sandbox's own memory say afterwards
"""
