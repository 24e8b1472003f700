"""A model is fetched once, whole, whatever happens on the way."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from divisi.deploy.prefetch import folder
from divisi.deploy.prefetch.__main__ import main
from divisi.deploy.prefetch.folder import read_mark
from tests.deploy.prefetch.file_server import REVISION, Files, serving


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for what others do more often than once a second."""
    monkeypatch.setattr(folder, "_LOOK_EVERY_S", 0.05)


@pytest.fixture
def files() -> Iterator[Files]:
    generator = random.Random(3)
    contents = {
        "config.json": b'{"model_type": "qwen3_next"}', "tokenizer.json": generator.randbytes(300_000),
        "model-1.safetensors": generator.randbytes(3_000_000), "model-2.safetensors": generator.randbytes(2_000_001),
        "README.md": b"# not wanted", ".gitattributes": b"*", "folder/extra.json": b"{}", "empty.txt": b"",
    }  # fmt: skip
    with serving(Files(contents)) as served:
        yield served


def hub(files: Files, folder: Path, *more: str) -> list[str]:
    return [f"--to={folder}", f"--endpoint={files.url}", "--repo=owner/name", f"--revision={REVISION}", *more]


def plain(files: Files, folder: Path, *more: str) -> list[str]:
    return [f"--to={folder}", f"--url={files.url}/plain", *more]


def wanted(files: Files) -> set[str]:
    return set(files.contents) - {"README.md", ".gitattributes"}


def assert_whole(files: Files, folder: Path) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(".divisi")} == wanted(files)
    for name in wanted(files):
        assert (folder / name).read_bytes() == files.contents[name]
    mark = read_mark(folder)
    assert mark is not None
    assert mark.weights


@pytest.mark.parametrize("source", [hub, plain])
def test_all_files_come_once(source: object, files: Files, tmp_path: Path) -> None:
    assert callable(source)
    assert main(source(files, tmp_path / "m")) == 0
    assert_whole(files, tmp_path / "m")
    assert main(source(files, tmp_path / "m")) == 0
    assert files.sent["model-1.safetensors"] == 3_000_000


@pytest.mark.parametrize("ranges", [True, False])
def test_a_killed_fetch_is_resumed(ranges: bool, files: Files, tmp_path: Path) -> None:
    """SIGKILL in the middle; the next one goes on where it was, if the source can, and begins anew if not."""
    files.pause_s, files.ranges = 0.02, ranges
    command = [sys.executable, "-P", "-m", "divisi.deploy.prefetch", *hub(files, tmp_path / "m")]
    with subprocess.Popen(command) as process:
        assert files.flowing.wait(60)
        process.kill()
    kept = sum(path.stat().st_size for path in (tmp_path / "m").rglob("*.part"))
    assert 0 < kept < 5_000_001
    assert read_mark(tmp_path / "m") is None
    files.pause_s = 0.0
    before = sum(files.sent.values())
    assert main(hub(files, tmp_path / "m")) == 0
    assert_whole(files, tmp_path / "m")
    again = sum(files.sent.values()) - before
    total = sum(len(files.contents[name]) for name in wanted(files))
    assert (again < total - kept + 2**17) == ranges


def test_a_broken_connection_is_taken_up_again(files: Files, tmp_path: Path) -> None:
    files.break_after = {"model-1.safetensors": 2**20, "tokenizer.json": 2**17}
    assert main(hub(files, tmp_path / "m")) == 0
    assert_whole(files, tmp_path / "m")
    assert files.sent["model-1.safetensors"] == 3_000_000


@pytest.mark.parametrize("name", ["model-1.safetensors", "tokenizer.json"])
def test_a_wrong_content_is_refused_and_removed(
    name: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = files.contents[name]
    files.replaced[name] = right[:-1] + bytes([right[-1] ^ 1])
    assert main(hub(files, tmp_path / "m")) == 1
    assert f"{name}: its {len(right)} bytes hash to" in capsys.readouterr().err
    assert not (tmp_path / "m" / name).exists()
    assert read_mark(tmp_path / "m") is None
    del files.replaced[name]
    assert main(hub(files, tmp_path / "m")) == 0
    assert_whole(files, tmp_path / "m")


def test_two_at_once_fetch_once(files: Files, tmp_path: Path) -> None:
    files.pause_s = 0.005
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(main(hub(files, tmp_path / "m")))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [0, 0]
    assert files.sent["model-2.safetensors"] == 2_000_001


def test_text_alone_and_then_all(files: Files, tmp_path: Path) -> None:
    assert main(hub(files, tmp_path / "m", "--without-weights")) == 0
    assert "model-1.safetensors" not in files.sent
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert main(hub(files, tmp_path / "m")) == 0
    assert_whole(files, tmp_path / "m")


def test_another_model_does_not_mix_in(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(hub(files, tmp_path / "m")) == 0
    assert main(plain(files, tmp_path / "m")) == 1
    assert "give another folder" in capsys.readouterr().err


def test_a_file_that_is_cut_short_afterwards_is_not_whole(files: Files, tmp_path: Path) -> None:
    assert main(hub(files, tmp_path / "m")) == 0
    (tmp_path / "m" / "config.json").write_text("")
    assert read_mark(tmp_path / "m") is None


def test_a_token_is_sent_and_asked_for(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.token = "hf_secret"
    assert main(hub(files, tmp_path / "m")) == 1
    said = capsys.readouterr().err
    assert "401" in said
    assert "model.token" in said
    (tmp_path / "token").write_text("hf_secret\n")
    assert main(hub(files, tmp_path / "m", f"--token-file={tmp_path / 'token'}")) == 0
    assert_whole(files, tmp_path / "m")


def test_waiting_ends_with_the_model_or_the_deadline(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--to={tmp_path / 'm'}", "--wait", "--deadline=0.1"]) == 1
    assert "no whole model" in capsys.readouterr().err
    waiting = threading.Thread(target=main, args=([f"--to={tmp_path / 'm'}", "--wait", "--deadline=60"],))
    waiting.start()
    assert main(hub(files, tmp_path / "m")) == 0
    waiting.join(30)
    assert not waiting.is_alive()


@pytest.mark.parametrize("path", ["../evil.json", "/etc/evil.json", "a/../../evil.json"])
def test_a_path_that_leads_elsewhere_is_refused(
    path: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.contents[path] = b"{}"
    assert main(hub(files, tmp_path / "m")) == 1
    assert "outside the model's folder" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["main", "0123"])
def test_a_branch_is_no_revision(
    revision: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*hub(files, tmp_path / "m"), f"--revision={revision}"]) == 1
    assert "40 hexadecimal digits" in capsys.readouterr().err


def test_too_little_room_is_said_before(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(hub(files, tmp_path / "m")) == 1
    assert files.sent == {}


def test_what_is_no_model_is_refused(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del files.contents["config.json"]
    assert main(hub(files, tmp_path / "m")) == 1
    assert "config.json" in capsys.readouterr().err
    assert json.dumps(files.sent) == "{}"
