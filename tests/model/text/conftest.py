from __future__ import annotations

from pathlib import Path

import pytest

from divisi.model.random_checkpoint.tokenizer import write_random_tokenizer
from divisi.model.text import Tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_random_tokenizer(folder, 700, 4096)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)
