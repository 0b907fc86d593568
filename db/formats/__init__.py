"""Formats of files that banks and providers exchange with us: what they contain, without a database or a network.

Readers read in pieces, so a file of any size needs little memory.

amounts           amounts in major units as integers of minor units
bank_statements   what every reader of bank statements yields
camt053           ISO 20022 camt.053, versions 001.02 to 001.13
bai2              BAI2 (Cash Management Balance Reporting, version 2)
bank_csv          CSV with a named mapping of columns
stripe_reports    Stripe's balance, payout reconciliation and payouts reports
nacha             NACHA files: ACH entries and returns
"""
