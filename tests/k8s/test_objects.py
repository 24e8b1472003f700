"""What is rendered is what Kubernetes, KubeRay and Ray Serve take."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.k8s.helm import PRESETS, Values, at, fetched, merged, preset, render, service_of
from tests.k8s.releases import INCREMENTAL, PREFETCH, REDIS

CRD = "DIVISI_RAYSERVICE_CRD"
"""Names a file with KubeRay's definition of a RayService; it is not ours to ship."""
CRD_URL = (
    "https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/ray.io_rayservices.yaml"
)
EVERYTHING: Values = yaml.safe_load((Path(__file__).parent / "everything.yaml").read_text(encoding="utf-8"))
CASES = {
    **{name: preset(name) for name in PRESETS},
    "everything": EVERYTHING,
    "prefetch": PREFETCH,
    "node cache": merged(
        PREFETCH, at("model", {"source": "nodeCache", "hostPath": "/srv/m", "token": {"secretName": "t"}})
    ),
    "redis": REDIS,
    "incremental": INCREMENTAL,
    "no policy": at("networkPolicy.enabled", False),
}


@cache
def validator() -> Any:
    """With Kubernetes' schemas read once, not for every object."""
    module = fetched("kubernetes-validate==1.37.0", "kubernetes_validate")
    module.utils.schema_contents = cache(module.utils.schema_contents)
    return module


@pytest.mark.parametrize("name", CASES)
def test_kubernetes_takes_its_kinds(name: str, tmp_path: Path) -> None:
    """By Kubernetes' own schemas, with unknown fields refused. RayService, HTTPRoute and PodMonitor are others'."""
    own = [manifest for manifest in render(CASES[name]) if manifest["kind"] not in ("RayService", "HTTPRoute")]
    assert {"Service", "ServiceAccount", "PodDisruptionBudget", "Pod"} <= {manifest["kind"] for manifest in own}
    for manifest in own:
        validator().validate(manifest, "1.35", strict=True)


@pytest.mark.parametrize("name", CASES)
def test_the_pods_are_kubernetes_pods(name: str) -> None:
    """Those of the Ray cluster, which its own definition has in full; here by Kubernetes' schemas."""
    cluster = service_of(render(CASES[name]))["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        pod["metadata"] = {"name": "pod", **pod["metadata"]}
        validator().validate(pod, "1.35", strict=True)


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    file = Path(os.environ.get(CRD, ""))
    if not file.is_file():
        pytest.skip(f"no definition of a RayService: curl -LO {CRD_URL} and name the file in {CRD}")
    versions = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    schema: dict[str, Any] = next(item for item in versions if item["name"] == "v1")["schema"]["openAPIV3Schema"]
    return closed(schema)


def closed(schema: Any) -> Any:
    """With unknown fields refused, and Kubernetes' own two words for types put in JSON schema's."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and "additionalProperties" not in schema
    ):
        made["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields") is True
    return made


@pytest.mark.parametrize("name", CASES)
def test_kuberay_takes_the_service(name: str, definition: dict[str, Any]) -> None:
    (service,) = [item for item in render(CASES[name]) if item["kind"] == "RayService"]
    definition["properties"]["metadata"] = {"type": "object"}
    problems = [
        f"{error.json_path}: {error.message[:200]}"
        for error in jsonschema.Draft7Validator(definition).iter_errors(service)
    ]
    assert problems == []


def unknown(given: Any, taken: Any, path: str = "") -> list[str]:
    """Keys of the configuration that Serve's schema drops without a word."""
    if isinstance(given, list):
        return [found for index, item in enumerate(given) for found in unknown(item, taken[index], f"{path}[{index}]")]
    if not isinstance(given, dict) or path.endswith(".args"):
        return []
    return [
        found
        for key, value in given.items()
        for found in ([f"{path}.{key}"] if key not in taken else unknown(value, taken[key], f"{path}.{key}"))
    ]


@pytest.mark.parametrize("name", CASES)
def test_serve_takes_its_configuration(name: str) -> None:
    config = yaml.safe_load(service_of(render(CASES[name]))["serveConfigV2"])
    taken = ServeDeploySchema.model_validate(config)
    assert unknown(config, taken.model_dump()) == []
    assert unknown({**config, "http_option": {}}, taken.model_dump()) == [".http_option"]
    (application,) = taken.applications
    assert application.import_path == "divisi.deploy.serve_app:build"


def test_monitors_come_where_their_api_is(helm_program: Path, tmp_path: Path) -> None:
    """By the program, which can be told of the cluster's APIs."""

    def kinds(*apis: str) -> list[str]:
        return [item["kind"] for item in objects(*apis)]

    def objects(*apis: str) -> list[Any]:
        command = [str(helm_program), "template", "divisi", str(Path(__file__).parents[2] / "k8s" / "divisi"), *apis]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path).stdout
        return [item for item in yaml.safe_load_all(text) if item]

    assert not {"PodMonitor", "ScrapeConfig"} & set(kinds())
    assert kinds("--api-versions", "monitoring.coreos.com/v1").count("PodMonitor") == 1
    made = objects("--api-versions", "monitoring.coreos.com/v1alpha1/ScrapeConfig")
    (config,) = [item["spec"]["httpSDConfigs"][0]["url"] for item in made if item["kind"] == "ScrapeConfig"]
    (service,) = [item["metadata"]["name"] for item in made if item["kind"] == "Service"]
    assert config == f"http://{service}.default.svc:8000/metrics/targets"


def test_the_program_is_content_with_each_preset(helm_program: Path, tmp_path: Path) -> None:
    chart = Path(__file__).parents[2] / "k8s" / "divisi"
    for name in PRESETS:
        values = ["--values", str(chart / "presets" / f"{name}.yaml")]
        subprocess.run(
            [str(helm_program), "lint", "--strict", str(chart), *values], check=True, capture_output=True, timeout=60
        )
    subprocess.run(
        [str(helm_program), "package", str(chart), "--destination", str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["divisi-0.1.0.tgz"]
