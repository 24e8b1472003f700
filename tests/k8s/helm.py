"""Helm itself, as a library: renders and checks the chart without a cluster.

It is no dependency of the tests, since it takes 240 MB: fetched once into the user's cache, by pip.
"""

from __future__ import annotations

import fcntl
import importlib
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "divisi"
PRESETS = tuple(sorted(path.stem for path in (CHART / "presets").glob("*.yaml")))
_PACKAGE = "helm-python-sdk==0.2.2"
_CACHE = Path.home() / ".cache" / "divisi" / "helm"

Values = dict[str, Any]
Manifest = dict[str, Any]


@cache
def helm() -> Any:
    """The library. Skips the test, with pip's words, where it cannot be had."""
    return fetched(_PACKAGE, "helm_python")


@cache
def fetched(requirement: str, module: str) -> Any:
    """A module of a package at an exact version: the environment's, else one in the user's cache."""
    with suppress(ImportError):
        return importlib.import_module(module)
    target = _CACHE / requirement
    target.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / module).is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                pytest.skip(f"pip cannot install {requirement}: {done.stderr.strip()[-300:]}")
    sys.path.append(str(target))
    return importlib.import_module(module)


def preset(name: str) -> Values:
    """The values of a preset."""
    values: Values = yaml.safe_load((CHART / "presets" / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def merged(*layers: Mapping[str, Any]) -> Values:
    """As Helm merges several files of values: mappings key by key, everything else replaced."""
    result: Values = {}
    for layer in layers:
        for key, value in deepcopy(dict(layer)).items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def at(path: str, value: object) -> Values:
    """`at("a.b", 1)` is `{"a": {"b": 1}}`."""
    first, _, rest = path.partition(".")
    return {first: at(rest, value) if rest else value}


@cache
def chart() -> Any:
    """As it is on the disk when first asked for."""
    return helm().Chart.load(str(CHART))


def schema_refusal(values: Values) -> str:
    """What Helm says by the schema against values; empty where it takes them."""
    try:
        chart().validate_schema(values)
    except helm().HelmError as error:
        return str(error)
    return ""


def refusal(values: Values) -> str:
    """What Helm says against values, by the schema or the templates; empty where it takes them."""
    if said := schema_refusal(values):
        return said
    try:
        chart().render(values, name="divisi", namespace="models")
    except helm().HelmError as error:
        return str(error)
    return ""


def render(*layers: Mapping[str, Any], name: str = "divisi") -> list[Manifest]:
    """All objects of a release, its tests too."""
    values = merged(*layers)
    chart().validate_schema(values)
    rendered = chart().render(values, name=name, namespace="models")
    texts = [text for file, text in sorted(rendered.items()) if not file.endswith(".txt")]
    return [manifest for text in texts for manifest in yaml.load_all(text, yaml.CSafeLoader) if manifest]


def one(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    """The only object of a kind, or the one of that name."""
    found = [item for item in manifests if item["kind"] == kind and name in ("", item["metadata"]["name"])]
    assert len(found) == 1, [item["metadata"]["name"] for item in manifests if item["kind"] == kind]
    return found[0]


def service_of(manifests: list[Manifest]) -> Manifest:
    """The spec of the RayService."""
    spec: Manifest = one(manifests, "RayService")["spec"]
    return spec


def settings_of(manifests: list[Manifest]) -> dict[str, Any]:
    """The `args` of the application."""
    (application,) = yaml.safe_load(service_of(manifests)["serveConfigV2"])["applications"]
    args: dict[str, Any] = application["args"]
    return args


def groups_of(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The groups of worker pods, by name."""
    return {group["groupName"]: group for group in service_of(manifests)["rayClusterConfig"]["workerGroupSpecs"]}


def pods_of(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod templates of head and groups, by name."""
    cluster = service_of(manifests)["rayClusterConfig"]
    groups = {name: group["template"] for name, group in groups_of(manifests).items()}
    return {"head": cluster["headGroupSpec"]["template"], **groups}
