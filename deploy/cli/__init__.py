"""The `divisi` command."""

from divisi.deploy.cli.main import main

__all__ = ["main"]
