"""The release 0.1.0."""
