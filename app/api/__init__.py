"""The HTTP API: one route per resource and operation."""
