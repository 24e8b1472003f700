"""The evaluation from beginning to end."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys

import httpx
from tqdm import tqdm

from divisi.model.demo.batches import Writer
from divisi.model.demo.evaluation.asking import Verdict, ask_all
from divisi.model.demo.evaluation.cases import SKILLS, Case, make_cases
from divisi.model.demo.evaluation.offline import look_inside
from divisi.model.demo.evaluation.report import rates, write_report
from divisi.model.demo.export import read_network

_BATCHES = 40
"""Held-out batches of 2,048 tokens that the offline part looks at."""


def evaluate(args: argparse.Namespace) -> int:
    """Ask the server, look at the weights, write both; returns the exit status."""
    if (skills := chosen_skills(args.skills)) is None:
        return 2
    network, writer = read_network(args.checkpoint), Writer(args.checkpoint)
    cases = [case for skill in skills for case in make_cases(skill, args.cases, args.seed)]
    try:
        verdicts = _ask(args, cases)
    except httpx.HTTPError as error:
        print(f"{args.url}: {error}; is a server with this model running there?", file=sys.stderr)
        return 1
    findings = look_inside(network, writer, _BATCHES)
    write_report(verdicts, {"mtp and routing": dataclasses.asdict(findings)}, args.out)
    for skill, (right, count) in rates(verdicts).items():
        print(f"{skill:16} {right:4} of {count}  {100 * right / count:5.1f} %")
    print(f"draft agreement  {' / '.join(f'{share:.2f}' for share in findings.agreement)}")
    print(f"{args.out} lists {sum(bool(verdict.problem) for verdict in verdicts)} failures")
    return 0


def chosen_skills(named: list[str] | None) -> list[str] | None:
    """Those named, all where none is; None, with a word on stderr, where one of them doesn't exist."""
    skills = named or list(SKILLS)
    unknown = [skill for skill in skills if skill not in SKILLS]
    if unknown:
        print(f"--skills: {unknown[0]!r} is none; take some of {', '.join(map(repr, SKILLS))}", file=sys.stderr)
        return None
    return skills


def _ask(args: argparse.Namespace, cases: list[Case]) -> list[Verdict]:
    model = args.model or httpx.get(f"{args.url}/v1/models").raise_for_status().json()["data"][0]["id"]
    with tqdm(total=len(cases), unit="case") as bar:
        return asyncio.run(ask_all(args.url, model, cases, args.at_once, lambda: bar.update()))
