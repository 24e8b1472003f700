"""What differs in the servers that are measured: how the attention worker's engine is built, and nothing else.

The worker's class is the product's own; before it is made, in its process, the function that builds engines is
replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from divisi.cluster.spec import GangSpec
from divisi.deploy.serve_app import AttentionWorker


class MeasuredAttentionWorker(AttentionWorker):
    """With clocks around its engine's steps."""

    def __init__(self, *arguments: Any) -> None:
        from divisi.benchmarks.served.clocks import EngineClock
        from divisi.cluster.assembly import build_engine

        def build_watched(*arguments: Any) -> Any:
            engine, experts = build_engine(*arguments)
            return EngineClock().watch(engine), experts

        patch("divisi.cluster.attention_rank.build_engine", build_watched).start()
        super().__init__(*arguments)


class IdleAttentionWorker(AttentionWorker):
    """With an engine whose steps compute nothing."""

    def __init__(self, *arguments: Any) -> None:
        from divisi.benchmarks.served.clocks import EngineClock
        from divisi.benchmarks.served.nothing import IdleEngine, plain_tokens

        def build_idle(spec: GangSpec, *_: Any) -> Any:
            experts = object()  # nobody asks them anything
            return EngineClock().watch(IdleEngine(plain_tokens(Path(spec.model_dir)))), experts

        patch("divisi.cluster.attention_rank.build_engine", build_idle).start()
        super().__init__(*arguments)
