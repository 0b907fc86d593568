"""The handlers of the outbox; table.py lists them."""
