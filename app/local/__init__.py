"""What runs everything on one machine: processes, `surety up`, the demo."""
