"""Prints requirements.lock: the exact versions, as installed here, of all that divisi and its extras need."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# Exact versions for reproducible installs: pip install -c requirements.lock -e '.[test]'
# Written by `make lock` from a tested environment. A build of torch for CUDA pins its own nvidia packages.
"""
EXTRAS = ("test", "bench", "dev")


def closure(name: str, extras: frozenset[str], found: dict[str, frozenset[str]]) -> None:
    """Add what a distribution requires under these extras to `found`, once for each new extra."""
    key = canonicalize_name(name)
    if key in found and extras <= found[key]:
        return
    found[key] = found.get(key, frozenset()) | extras
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            closure(requirement.name, frozenset(requirement.extras), found)


def main() -> None:
    found: dict[str, frozenset[str]] = {}
    closure("divisi", frozenset(EXTRAS), found)
    del found["divisi"]
    print(HEADER, end="")
    for name in sorted(found):
        # the local part, as in +cpu, names a build and not a version
        print(f"{name}=={distribution(name).version.partition('+')[0]}")


if __name__ == "__main__":
    try:
        main()
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; install '.[{','.join(EXTRAS)}]' first") from None
