"""Stripe: the client, its errors, and its objects as facts."""
