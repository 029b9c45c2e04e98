"""The `kvloom` command. `app` is its entry point; every other module holds a group of commands."""

from .app import main

__all__ = ["main"]
