"""Programs of merchants that use generated clients: checked for types and run by tests/end_to_end."""
