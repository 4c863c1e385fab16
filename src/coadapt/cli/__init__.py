"""The command line: one file for each verb. Help needs no torch."""

from coadapt.cli.group import main

__all__ = ["main"]
