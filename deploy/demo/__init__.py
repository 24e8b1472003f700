"""`make demo`: a split cluster on this machine, asked a question and given a tool to call."""

from divisi.deploy.demo.server import DemoFailed, running_server

__all__ = ["DemoFailed", "running_server"]
