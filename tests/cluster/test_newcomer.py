"""What a rank imports as it starts disturbs neither those that serve nor itself later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import gc, os, sys
from divisi.cluster.newcomer import import_beside_others

try:
    module = import_beside_others(sys.argv[1])
except ImportError:
    module = None
here = os.getpriority(os.PRIO_PROCESS, 0)
if module is not None:
    assert not any(each is module.MADE for each in gc.get_objects()), "the collector would look at it"
    print(module.COLLECTED, module.PRIORITY - here)
print(here - int(sys.argv[2]), gc.isenabled())
"""
MODULE = """
import gc, os

MADE, COLLECTED, PRIORITY = [[]], gc.isenabled(), os.getpriority(os.PRIO_PROCESS, 0)
"""


@pytest.mark.parametrize(("name", "said"), [("heavy", "False 10\n0 True\n"), ("missing", "0 True\n")])
def test_it_gives_way_and_leaves_nothing_to_collect(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "heavy.py").write_text(MODULE)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    command = [sys.executable, "-c", PROGRAM, name, str(own)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == said
