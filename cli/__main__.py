"""`python -m kvloom.cli`."""

from .app import main

main()
