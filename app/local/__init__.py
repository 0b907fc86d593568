"""Surety on one machine: process groups, `surety up`, the demo."""
