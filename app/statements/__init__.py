"""Statements of merchants: read once, written as CSV, JSON or PDF."""
