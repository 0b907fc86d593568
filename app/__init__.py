"""What listens (API, webhook receiver, sandbox, console) and the command line."""
