"""What all tests share: the thread limit, the full tier, and the record of measured numbers."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports torch. The models are tiny and the cores few: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from tests.parts import PARTS, part_of
from tests.side_by_side import servers_first

if TYPE_CHECKING:
    from tests.parity.oracle import Excuses

TESTS = Path(__file__).parent
RESULTS = TESTS / "results"
VERSIONS = ("torch", "triton", "ray", "transformers", "tokenizers", "safetensors")
_RECORDS = pytest.StashKey[dict[str, dict[str, dict[str, Any]]]]()
"""Of each part, what is known of each test."""
_PART = pytest.StashKey[str]()
"""Of a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--verify", action="store_true", help="full tier: store results in tests/results/verify-*.{json,md}"
    )
    parser.addoption(
        "--again",
        action="store_true",
        help="with --verify: replace the stored results of the tests that run, no others",
    )
    parser.addoption("--part", choices=PARTS, help="only the tests of this part of the full tier, see tests/parts.py")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore Ctrl-C, and so would the programs that tests start there and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_RECORDS] = {}
    # The same examples in each run; how long one takes says more of what else the machine does than of the code.
    hypothesis.settings.register_profile("divisi", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("divisi")
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        os.nice(5)  # servers under test, which the first worker starts, come first


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have the C++ kernels compiled before there are processes that would wait for each other's, or be timed."""
    if "PYTEST_XDIST_WORKER" not in os.environ and not session.config.option.collectonly:
        from divisi.kernels.native.loader import load_library

        load_library()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which of two processes runs what."""
    from tests.side_by_side import Groups

    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test its part; leave those that `--part` doesn't want."""
    for item in items:
        named = [str(mark.args[0]) for mark in item.iter_markers("part")]
        try:
            item.stash[_PART] = part_of(item.path.relative_to(TESTS).as_posix(), named)
        except ValueError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from error
    if wanted := config.getoption("--part"):
        config.hook.pytest_deselected(items=[item for item in items if item.stash[_PART] != wanted])
        items[:] = [item for item in items if item.stash[_PART] == wanted]
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: servers_first(item.path.relative_to(TESTS).as_posix()))


@pytest.fixture(scope="session")
def full_tier(pytestconfig: pytest.Config) -> bool:
    """Whether this is `make verify`: tests may then take their full sizes."""
    return bool(pytestconfig.getoption("--verify"))


@pytest.fixture
def record_result(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """`record_result(name, value)` keeps a measured number of this test for the report of `make verify`."""
    records = _records_of(request.config, request.node.stash[_PART])

    def record(name: str, value: object) -> None:
        records.setdefault(request.node.nodeid, {}).setdefault("numbers", {})[name] = value

    return record


@pytest.fixture(scope="session")
def excuses(pytestconfig: pytest.Config) -> Iterator[Excuses]:
    """Compares greedy tokens with an oracle's; over the whole session, few may differ where the oracle is undecided."""
    from tests.parity.oracle import Excuses

    excuses = Excuses()
    yield excuses
    if excuses.cases:
        records = _records_of(pytestconfig, part_of("parity"))
        entry = records.setdefault("all greedy comparisons with the oracle", {})
        entry |= {
            "seconds": 0.0,
            "outcome": "session total",
            "numbers": {"cases": excuses.cases, "excused": excuses.used},
        }
    excuses.expect_few()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    entry = _records_of(item.config, item.stash[_PART]).setdefault(item.nodeid, {})
    entry["seconds"] = round(entry.get("seconds", 0.0) + report.duration, 3)
    if report.when == "call" or report.outcome != "passed":
        entry["outcome"] = report.outcome
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--verify") and not session.config.option.collectonly:
        for part, records in session.config.stash[_RECORDS].items():
            _store(part, _amended(part, records) if session.config.getoption("--again") else records)


def _records_of(config: pytest.Config, part: str) -> dict[str, dict[str, Any]]:
    return config.stash[_RECORDS].setdefault(part, {})


def _store(part: str, records: dict[str, dict[str, Any]]) -> None:
    outcomes = [entry.get("outcome", "error") for entry in records.values()]
    report = {
        "part": part,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "counts": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        "tests": records,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"verify-{part}.json").write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    (RESULTS / f"verify-{part}.md").write_text(_markdown(report), encoding="utf-8")


def _amended(part: str, records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results as stored, with those of tests that ran again in place of theirs; the older say their commit."""
    file = RESULTS / f"verify-{part}.json"
    if not file.exists():
        return records
    stored = json.loads(file.read_text(encoding="utf-8"))
    kept = {test: {"commit": stored["commit"], **entry} for test, entry in stored["tests"].items()}
    return {test: records.get(test, entry) for test, entry in (kept | records).items()}


def _commit() -> str:
    """The commit, with a mark where the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# make verify PART={report['part']}, {report['date']}",
        "",
        f"Commit {report['commit']}; {report['machine']}; Python {report['python']}; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "",
        ", ".join(f"{count} {outcome}" for outcome, count in report["counts"].items()),
        *_older(report["tests"]),
        "",
        "| test | outcome | s | measured |",
        "|---|---|---|---|",
    ]
    for test, entry in report["tests"].items():
        numbers = entry.get("numbers", {})
        if numbers or entry.get("outcome") != "passed":
            shown = "; ".join(f"{name} = {value}" for name, value in numbers.items()).replace("|", "\\|")
            lines.append(f"| {test} | {entry.get('outcome', 'error')} | {entry['seconds']} | {shown} |")
    return "\n".join(lines) + "\n"


def _older(tests: dict[str, dict[str, Any]]) -> list[str]:
    """A line on the results that are of other commits."""
    counts = Counter(entry["commit"] for entry in tests.values() if "commit" in entry)
    return [f"Of these at {commit}: {count}" for commit, count in counts.items()]
