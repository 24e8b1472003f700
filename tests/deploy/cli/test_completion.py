"""`divisi completion`: the scripts, run by the shells themselves where they are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from divisi.deploy.cli import main
from divisi.deploy.cli.completion import Command, walk
from divisi.deploy.cli.main import build_parser

COMMANDS = list(walk(build_parser()))
Complete = Callable[[str], set[str]]


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / f"divisi.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def complete_in_bash(path: Path, line: str) -> set[str]:
    typed = f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
    call = f'source {path}; {typed}; _divisi; echo "${{COMPREPLY[@]}}"'
    return set(run("bash", "-c", call, cwd=path.parent).split())


def complete_in_fish(path: Path, line: str) -> set[str]:
    line = line.removesuffix('""')
    out = run("fish", "--no-config", "-c", f"source {path}; complete -C {line!r}", cwd=path.parent)
    return {line.partition("\t")[0] for line in out.splitlines()}


@pytest.fixture(params=["bash", "fish"])
def complete(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Complete:
    """What a shell offers for a line whose last word is being typed."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    path = script(request.param, tmp_path, capsys)
    ask = {"bash": complete_in_bash, "fish": complete_in_fish}[request.param]
    return lambda line: ask(path, line)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words) or "divisi")
def test_every_flag_of_every_command(command: Command, complete: Complete) -> None:
    wanted = {name for flag in command.flags for name in flag.names if name.startswith("--")}
    assert wanted
    assert complete(" ".join(("divisi", *command.words, "--"))) >= wanted


def test_commands_and_values(complete: Complete) -> None:
    commands = {"serve", "chat", "bench", "inspect", "checkpoint", "completion"}
    assert complete('divisi ""') & commands == commands
    assert complete("divisi che") == {"checkpoint"}
    assert complete('divisi checkpoint ""') >= {"random"}
    assert complete('divisi completion ""') >= {"bash", "zsh", "fish"}
    assert complete('divisi serve --dtype ""') == {"auto", "bfloat16", "float32", "float16"}
    assert complete("divisi bench --endpoint co") == {"completions"}


def test_files_complete_where_a_file_is_due(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "model-a").mkdir()
    assert {name.rstrip("/") for name in complete("divisi serve mod")} == {"model-a"}
    assert {name.rstrip("/") for name in complete("divisi chat --tools mod")} == {"model-a"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_can_read_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("zsh", tmp_path, capsys)
    call = f"autoload -U compinit; compinit -u -D; source {path}; print $_comps[divisi]"
    assert "_divisi" in run("zsh", "-f", "-c", call, cwd=tmp_path)


def test_help_and_completion_import_little() -> None:
    code = (
        "import sys; from divisi.deploy.cli.main import build_parser; build_parser().format_help(); "
        "print(sorted({'torch', 'ray', 'pydantic', 'httpx', 'rich', 'prompt_toolkit', 'jinja2'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code, cwd=Path("/")).strip() == "[]"
