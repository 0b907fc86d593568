"""`surety demo`: every service as a process on this machine, faults derived from a seed, and a counted report.

run              the order of events in a run
workspace        its folder and its database
services         its processes
merchants        payments over HTTP
payment_actions  captures, cancellations, refunds, evidence
sandbox_record   the sandbox's own record of charges, refunds and disputes
checks           invariants, and differences between that record and the database
observed_faults  the faults with their counted consequences
report           all numbers
rendering        the report as tables
"""
