"""The handlers of the outbox's events, and the calls that they make."""
