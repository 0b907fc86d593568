"""The servers (API, webhook receiver, sandbox) and the command line."""
