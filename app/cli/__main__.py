"""`python -m app.cli`, if the program `surety` is not on the path."""

from app.cli import main

main()
