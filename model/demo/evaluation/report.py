"""What an evaluation found, as JSON and as a page to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from divisi.model.demo.evaluation.asking import Verdict

_SHOWN = 12
"""Failures of a skill on the page; the JSON has them all."""


def rates(verdicts: Sequence[Verdict]) -> dict[str, tuple[int, int]]:
    """Right and all answers by skill."""
    found: dict[str, tuple[int, int]] = {}
    for verdict in verdicts:
        right, count = found.get(verdict.case.skill, (0, 0))
        found[verdict.case.skill] = right + (not verdict.problem), count + 1
    return found


def write_report(verdicts: Sequence[Verdict], offline: Mapping[str, Any], out: Path) -> None:
    """Write `out` as JSON and the page beside it, with the suffix `.md`."""
    failures = [_failure(verdict) for verdict in verdicts if verdict.problem]
    table = {skill: {"right": right, "cases": count} for skill, (right, count) in rates(verdicts).items()}
    out.write_text(
        json.dumps({"skills": table, **offline, "failures": failures}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    out.with_suffix(".md").write_text(_page(verdicts, offline), encoding="utf-8")


def _page(verdicts: Sequence[Verdict], offline: Mapping[str, Any]) -> str:
    lines = ["| skill | right | cases | % |", "|---|---|---|---|"]
    lines += [
        f"| {skill} | {right} | {count} | {100 * right / count:.1f} |"
        for skill, (right, count) in rates(verdicts).items()
    ]
    for name, value in offline.items():
        lines += ["", f"{name}: {json.dumps(value)}"]
    for skill in rates(verdicts):
        failed = [verdict for verdict in verdicts if verdict.problem and verdict.case.skill == skill]
        if failed:
            lines += [
                "",
                f"## {skill}: {len(failed)} wrong" + (f", the first {_SHOWN}" if len(failed) > _SHOWN else ""),
            ]
        for verdict in failed[:_SHOWN]:
            asked, wanted, got = _shown(verdict)
            lines += ["", f"- asked: `{asked}`", f"  wanted: `{wanted}`", f"  got ({verdict.problem}): `{got}`"]
    return "\n".join(lines) + "\n"


def _failure(verdict: Verdict) -> dict[str, str]:
    asked, wanted, got = _shown(verdict)
    return {"skill": verdict.case.skill, "problem": verdict.problem, "asked": asked, "wanted": wanted, "got": got}


def _shown(verdict: Verdict) -> tuple[str, str, str]:
    case = verdict.case
    asked = str(case.messages[-1]["content"])
    asked = asked if len(asked) < 400 else f"[...] {asked[-160:]}"
    wanted = json.dumps(case.calls, ensure_ascii=False) if case.calls else case.text
    got = json.dumps(verdict.calls, ensure_ascii=False) if verdict.calls else verdict.text
    return asked, wanted, f"{got} (thought: {verdict.thought})" if verdict.thought else got
