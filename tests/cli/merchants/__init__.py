"""Merchants: their accounts, their fees."""
