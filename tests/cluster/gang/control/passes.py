"""Passes by who brings how many rows."""

from __future__ import annotations

from divisi.cluster.passes import Pass, PassKind


def full(counts: dict[int, int]) -> tuple[Pass, ...]:
    return (Pass(PassKind.FULL, counts),)


def draft(counts: dict[int, int]) -> Pass:
    return Pass(PassKind.DRAFT, counts)
