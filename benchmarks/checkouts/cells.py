"""What `pairs` measures: the rows of its table, the engines that run them, and the ratios that are wanted of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from divisi.model.demo import checkpoint_dir
from divisi.model.random_checkpoint import write_random_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = ("bench-s", "bench-m", "divisi-demo")
CONTEXTS = ("short", "8k", "32k")
_ALL_ALIKE = 0.98
"""The ratio that is wanted where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table: `runs` times `prompts` prompts of `length` tokens, each with an answer of `count`."""

    title: str
    prompts: int
    length: int
    count: int = 1
    skip: int = 0
    """Steps before those that are timed."""
    block: int = 1
    """Timed steps of one checkout before it is the other's turn."""
    runs: int = 1
    target: float = _ALL_ALIKE
    """What ratio is wanted."""
    chunks: int = 0
    """Steps of its prompt, where these take turns one by one and are a row of their own, `prompt`."""
    prompt: str = ""
    prompt_target: float = _ALL_ALIKE

    @property
    def blocks(self) -> int:
        """How often a run whose prompt is a row of its own is timed."""
        return self.chunks + -(-(self.count - 1) // self.block)

    @property
    def rows(self) -> list[tuple[str, float]]:
        """Titles and the ratios that are wanted, in the order of a run's times."""
        return [*([(self.prompt, self.prompt_target)] if self.chunks else []), (self.title, self.target)]

    def wanting(self, targets: Mapping[str, float]) -> Cell:
        """The same with the ratios that are wanted by title; what is not named stays as it is."""
        return replace(
            self,
            target=targets.get(self.title, self.target),
            prompt_target=targets.get(self.prompt, self.prompt_target),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Cells that one engine runs."""

    model: str
    model_dir: Path
    limits: dict[str, int]
    cells: Sequence[Cell]


# 1024 rows a step in every checkout: older ones have another limit besides, which is 1024 then
_CHUNK = 1024
_WIDE = {"num_pages": 1024, "page_size": 16, "max_seqs": 32, "max_step_tokens": _CHUNK, "max_prefill_chunk": _CHUNK}
_NARROW = _WIDE | {"max_seqs": 16}
_LONG = _WIDE | {"num_pages": 2112, "max_seqs": 2}


def _decode(batch: int) -> Cell:
    return Cell(f"decode {batch}", batch, 16, count=33, skip=1, block=4)


def _after(context: str) -> Cell:
    """A long prompt chunk by chunk, then tokens after it."""
    length = 1024 * int(context.removesuffix("k"))
    return Cell(
        f"decode 1 at {context}", 1, length, count=33, block=4, chunks=length // _CHUNK, prompt=f"prefill {context}"
    )


_TOGETHER = Cell("prefill 16 x 64", 16, 64, runs=2)
_SHORT = (
    *map(_decode, (1, 4, 16, 32)),
    Cell("prefill 512", 1, 512, runs=4),
    Cell("prefill 4096", 1, 4096),
)


def parts_of(models: Sequence[str], contexts: Sequence[str], checkpoints: Path, targets: Path | None) -> list[Part]:
    """The engines of `models`, whose random checkpoints are in the folder `checkpoints`, or are made there.

    Raises SystemExit where the file of targets names what is not measured here or elsewhere.
    """
    wanted = _read(targets)
    parts = []
    for model in models:
        path = checkpoint_dir() if model == "divisi-demo" else _random_checkpoint(checkpoints, model)
        ratios = wanted.get(model, {})
        parts += [
            Part(model, path, limits, [cell.wanting(ratios) for cell in cells])
            for limits, cells in _engines(model, contexts)
        ]
    return parts


def _engines(model: str, contexts: Sequence[str]) -> list[tuple[dict[str, int], Sequence[Cell]]]:
    found: list[tuple[dict[str, int], Sequence[Cell]]] = []
    if "short" in contexts and model == "divisi-demo":
        found.append((_NARROW, (_decode(1), _decode(4), _TOGETHER)))
    elif "short" in contexts:
        found += [(_WIDE, _SHORT), (_NARROW, (_TOGETHER,))]
    long = [_after(context) for context in contexts if context != "short"]
    if long and model != "divisi-demo":
        found.append((_LONG, long))
    return found


def _read(targets: Path | None) -> dict[str, dict[str, float]]:
    if targets is None:
        return {}
    wanted: dict[str, dict[str, float]] = json.loads(targets.read_text(encoding="utf-8"))
    for model, ratios in wanted.items():
        if model not in MODELS:
            raise SystemExit(f"--targets {targets} names the model {model!r}; there are {', '.join(MODELS)}")
        titles = [title for _, cells in _engines(model, CONTEXTS) for cell in cells for title, _ in cell.rows]
        if unknown := sorted(set(ratios) - set(titles)):
            raise SystemExit(f"--targets {targets} names {unknown[0]!r} of {model}, which has {', '.join(titles)}")
    return wanted


def _random_checkpoint(folder: Path, model: str) -> Path:
    """Written under another name first, so that one that is there is whole."""
    path, unfinished = folder / model, folder / f"{model}.unfinished"
    if not path.exists():
        write_random_checkpoint(unfinished, json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8")))
        unfinished.rename(path)
    return path
