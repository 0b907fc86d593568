"""Stripe: the client, its errors, and what its objects say, as facts."""
