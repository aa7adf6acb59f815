"""The commands and their shared options, nothing else. May import every room; heavy ones only inside a command."""

from headfold.export.cli.root import main

__all__ = ["main"]
