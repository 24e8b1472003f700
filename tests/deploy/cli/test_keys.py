"""`divisi keys new`: a key that is shown once, and a line that a key file takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from divisi.deploy.cli.main import main
from divisi.deploy.limits.key_file import read_keys


def test_a_new_key_works_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "team a"]) == 0
    shown = capsys.readouterr()
    key = shown.err.split()[-1]
    assert key not in shown.out
    (tmp_path / "keys.txt").write_text(shown.out, encoding="utf-8")
    found = read_keys(tmp_path / "keys.txt").find(key)
    assert found is not None
    assert found.name == "team a"


@pytest.mark.parametrize("name", ["", "a#b", "a\nb", "x" * 129])
def test_a_name_that_a_file_cannot_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", name]) == 2
    assert "cannot be a key's name" in capsys.readouterr().err
