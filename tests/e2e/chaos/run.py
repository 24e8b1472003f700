"""The server that the blows fall on, and how what came of it is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from divisi.model.demo import checkpoint_dir
from tests.e2e.chaos.asks import Ask
from tests.e2e.chaos.harness import Record
from tests.e2e.chaos.judge import LONGEST_GAP_S, Difference, Verdict, judge
from tests.e2e.chaos.reading import Answer
from tests.e2e.conftest import Cluster, running_cluster

if TYPE_CHECKING:
    from tests.e2e.chaos.ties import Ties

_SHAPE = ("--attention-workers", "2", "--expert-shards", "2", "--ingress-replicas", "2")
_SIZES = ("--device", "cpu", "--dtype", "float32", "--kv-memory", "64MiB", "--max-seqs", "16")
_DRAFTS = ("--mtp-max-draft-tokens", "3", "--no-mtp-adaptive")
_READY_S = 200.0
"""Nine processes import torch or Ray, on a machine that may be busy."""


@contextmanager
def served(log: Path, copies: int = 0) -> Iterator[Cluster]:
    """Two workers, two shards, with copies of each other's experts or none, two ingresses; nothing of it may be left at
    the end."""
    (config := log.with_name("divisi.toml")).write_text(f"[gang]\nexpert_copies = {copies}\n")
    flags = (*_SHAPE, *_SIZES, *_DRAFTS, "--max-model-len", "4096", "--max-queued-requests", "64")
    flags += ("--config", str(config))
    with running_cluster(checkpoint_dir(), log, *flags, ready_within_s=_READY_S) as cluster:
        yield cluster


def verdict_of(
    record: Record, asked: Sequence[Ask], longest_gap_s: float = LONGEST_GAP_S, model_dir: Path | None = None
) -> Verdict:
    """By the references, with the margin rule for greedy answers of the model, by default the demo model."""

    @cache
    def ties() -> Ties:
        from tests.e2e.chaos.ties import Ties  # late: it loads transformers, and seldom does an answer differ

        return Ties(model_dir or checkpoint_dir(), {ask.name for ask in asked if ask.greedy})

    def undecided(reference: Answer, found: Difference) -> bool:
        return ties()(reference, found)

    return judge(record.references, record.answers, record.struck, record.no_workers, undecided, longest_gap_s)
