"""`make test` runs tests in two processes, for two cores: which tests must not run beside which.

The tests of a file stay together, since they share what is slow to make. All that starts Ray, HAProxy or a whole
server, or counts the machine's processes, is one group: its tests run one after another, in one process, first.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

SERVERS = (
    "e2e",
    "deploy/haproxy",
    "deploy/supervision",
    "deploy/test_demo.py",
    "deploy/test_local_run.py",
    "deploy/ray/test_port_lock.py",
    "benchmarks/served",
    "cluster/ray",
    "test_wheel.py",
)
LONG = ("kernels/test_triton.py",)
"""Files that take minutes: they begin early, or one process would wait for them at the end."""


def group_of(path: str) -> str:
    """Tests of one group run in one process; `path` is a test file's below tests/."""
    return "servers" if _is_in(path, SERVERS) else path


def servers_first(path: str) -> int:
    """The order of files."""
    return 0 if _is_in(path, SERVERS) else 1 if _is_in(path, LONG) else 2


def _is_in(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in names)


class Groups(LoadScopeScheduling):
    """xdist's scheduler, with these groups in place of modules."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0].removeprefix("tests/"))
