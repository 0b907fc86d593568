"""Customers and payers."""
