"""`divisi inspect` and `divisi serve` refuse the same files, with the same words, before anything is started."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from divisi.deploy.cli import main
from divisi.deploy.cli.check import check_deployment
from divisi.deploy.settings import Settings
from divisi.model.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "tiny"
    write_random_checkpoint(folder, None, 3)
    return folder


@pytest.fixture
def model_dir(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "tiny"))


def template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def setting(group: str, name: str, value: str) -> Callable[[Path], object]:
    """Set in the configuration file beside the model's folder."""
    return lambda folder: (folder.parent / "divisi.toml").write_text(f'[{group}]\n{name} = "{folder.parent}/{value}"\n')


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json is not valid"),
        (template("{% for"), "chat template does not compile"),
        (template("{{ nobody_defines(messages) }}"), "'nobody_defines' is undefined"),
        (template("{{ raise_exception('never') }}"), "the chat template refuses the conversation: never"),
        (setting("auth", "api_keys_file", "none.txt"), "none.txt: cannot read the API keys"),
        (setting("gang", "secret_file", "none.txt"), "none.txt: cannot read the secret"),
        (setting("log", "file", "tiny/config.json/log"), "config.json is no directory"),
        (pickled, "pickle"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    ],
)
def test_both_refuse(
    damage: Callable[[Path], object], words: str, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = model_dir.parent / "divisi.toml"
    config.touch()
    damage(model_dir)
    said = []
    for command in ("inspect", "serve"):
        assert main([command, str(model_dir), "--config", str(config)]) == 2
        said.append(capfd.readouterr().err)
    assert words in said[0]
    assert said[0] == said[1]
    assert said[0].count("\n") == 1


@pytest.mark.parametrize(
    "source",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}",
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[-1].content }}",
    ],
    ids=["wants a system message", "takes tools"],
)
def test_templates_that_render_what_they_are_for_pass(source: str, model_dir: Path) -> None:
    template(source)(model_dir)
    check_deployment(Settings.from_args({"model": {"model_dir": str(model_dir)}}), 0)


def test_files_with_byte_order_marks_and_without_an_index_are_served(sound: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "sharded", None, 3, max_file_bytes=2_000_000)
    (tmp_path / "sharded" / "model.safetensors.index.json").unlink()
    for path in (*tmp_path.glob("sharded/*.json"), *tmp_path.glob("sharded/*.jinja")):
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    checked = check_deployment(Settings.from_args({"model": {"model_dir": str(tmp_path / "sharded")}}), 0)
    assert len({info.file for info in checked.checkpoint.tensors.values()}) > 1
    assert checked.config == check_deployment(Settings.from_args({"model": {"model_dir": str(sound)}}), 0).config
