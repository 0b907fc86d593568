"""Stripe's objects.

intents         a PaymentIntent's life
refunds         a refund's life
disputes        a dispute's life
fraud_warnings  early fraud warnings
balance         balance transactions, the balance, payouts
payloads        the properties of new objects
cards           the test cards
currencies      minimum amounts, exchange rates, the processing fee
"""
