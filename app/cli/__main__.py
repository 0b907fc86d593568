"""`python -m app.cli`, for where the program `surety` is not on the path."""

from app.cli import main

main()
