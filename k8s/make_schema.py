"""Writes what of the chart is generated: `values.schema.json` and the table of values in its README.

usage: make_schema.py [--check]

The part below `divisi` comes from Divisi's settings, the rest is written here; unknown keys are refused everywhere.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from kubernetes_types import (
    AFFINITY,
    BOOLEAN,
    COUNT,
    ENV,
    GATEWAYS,
    LABELS,
    NAME,
    NAMED,
    PEERS,
    PERCENT,
    PORT,
    POSITIVE,
    PULL_SECRETS,
    QUANTITY,
    RESOURCES,
    SPREAD,
    STRING,
    TOLERATIONS,
    VOLUME_MOUNTS,
    VOLUMES,
    Schema,
    closed,
    listed,
    mapped,
    one_of,
)  # fmt: skip

from divisi.deploy.settings import Settings

CHART = Path(__file__).parent / "divisi"
NOT_HERE = {
    "gang": ("pin_cores", "secret_file", "tls"),
    "http": ("host", "port", "haproxy"),
    "auth": ("api_keys_file",),
    "log": ("file", "max_file_bytes"),
    "telemetry": ("scrape_from_port",),
    "": ("placement",),
}
"""Settings that the chart decides, by their group."""
SHARED = {
    "affinity": AFFINITY, "tolerations": TOLERATIONS, "spread": SPREAD, "resources": RESOURCES, "env": ENV,
    "volumes": VOLUMES, "mounts": VOLUME_MOUNTS, "peers": PEERS,
}  # fmt: skip
"""Written once."""
_TABLE = ("<!-- values -->\n", "<!-- end of values -->\n")


def settings_schema() -> Schema:
    """Of `divisi`: the settings but those that the chart decides, with `device` named, since `auto` would not do."""
    schema = Settings.model_json_schema()
    groups = {name: _inlined(field, schema["$defs"]) for name, field in schema["properties"].items()}
    for group, names in NOT_HERE.items():
        for name in names:
            del (groups[group]["properties"] if group else groups)[name]
    gang = groups["gang"]
    gang["properties"]["device"]["enum"].remove("auto")
    gang["required"] = ["device"]
    return closed(groups, ("model", "gang"))


def _inlined(schema: Any, definitions: dict[str, Schema]) -> Any:
    """Without references and without what is for people only; what pydantic adds to a size of its own is left out."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    kept = {key: value for key, value in schema.items() if key not in ("title", "default", "ge")}
    if isinstance(kept.get("description"), str):
        del kept["description"]
    inlined = {
        key: {name: _inlined(field, definitions) for name, field in value.items()}
        if key == "properties"
        else _inlined(value, definitions)
        for key, value in kept.items()
    }
    return inlined


def _optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _shared(name: str) -> Schema:
    assert name in SHARED
    return {"$ref": f"#/$defs/{name}"}


def _secret(*keys: str) -> Schema:
    return closed({"secretName": NAME, **dict.fromkeys(keys, NAMED)})


def _pods() -> dict[str, Schema]:
    return {
        "resources": _shared("resources"), "nodeSelector": LABELS, "tolerations": _shared("tolerations"),
        "affinity": _shared("affinity"), "topologySpreadConstraints": _shared("spread"), "priorityClassName": NAME,
        "runtimeClassName": NAME, "extraEnv": _shared("env"), "podAnnotations": LABELS, "podLabels": LABELS,
        "shmSize": QUANTITY,
    }  # fmt: skip


def _group() -> dict[str, Schema]:
    return {
        "minReplicas": _optional(COUNT), "maxReplicas": _optional(POSITIVE), **_pods(),
        "extraVolumes": _shared("volumes"), "extraVolumeMounts": _shared("mounts"),
    }  # fmt: skip


def _ranks() -> Schema:
    return closed({
        **_group(), "ranksPerPod": POSITIVE, "extraResources": mapped(QUANTITY), "ipcLock": BOOLEAN,
        "accelerator": closed({"resource": STRING, "selector": LABELS}),
    })  # fmt: skip


def _spelled(pattern: str) -> Schema:
    return {"type": "string", "pattern": f"^{pattern}$"}


def _model() -> Schema:
    return closed({
        "source": one_of("image", "claim", "prefetch", "nodeCache", "hostPath"),
        "mountPath": _spelled("/[^/].*[^/]"),
        "claim": closed({"name": NAME, "subPath": STRING}),
        "hostPath": _spelled("(/.*)?"),
        "prefetch": closed({
            "endpoint": _spelled("https?://.+"), "repo": _spelled("([^/]+/[^/]+)?"),
            "revision": _spelled("([0-9a-f]{40})?"), "url": _spelled("(https?://.+)?"),
            "size": QUANTITY, "storageClassName": NAME, "connections": POSITIVE, "deadlineSeconds": POSITIVE,
            "backoffLimit": COUNT, "resources": _shared("resources"), "nodeSelector": LABELS,
            "tolerations": _shared("tolerations"),
        }),
        "token": _secret("secretKey"),
    })  # fmt: skip


def _network() -> Schema:
    peers = ("operator", "loadBalancer", "prometheus", "dns", "apiServer", "redis", "modelSource", "telemetry")
    ports = ("apiServerPorts", "modelSourcePorts", "telemetryPorts")
    named = {**dict.fromkeys(peers, _shared("peers")), **{name: listed(PORT) for name in ports}}
    return closed({"enabled": BOOLEAN, **named})


def values_schema() -> Schema:
    """Of all values."""
    route = {"enabled": BOOLEAN, "annotations": LABELS}
    properties = {
        "nameOverride": NAME, "fullnameOverride": NAME,
        "image": closed({
            "repository": NAMED, "tag": STRING, "pullPolicy": one_of("Always", "IfNotPresent", "Never"),
        }),
        "imagePullSecrets": PULL_SECRETS,
        "divisi": settings_schema(),
        "model": _model(),
        "secrets": closed({"apiKeys": _secret("secretKey"), "gang": _secret("secretKey"), "tls": _secret()}),
        "head": closed(_pods()),
        "groups": closed({
            "ingress": closed(_group()), "attention": _ranks(), "experts": _ranks(), "colocated": _ranks(),
        }),
        "haproxy": closed({"enabled": BOOLEAN}),
        "autoscaling": closed({
            "enabled": BOOLEAN, "idleTimeoutSeconds": COUNT, "resources": _shared("resources"),
            "upscalingMode": one_of("Default", "Aggressive", "Conservative"),
        }),
        "upgrade": closed({
            "type": one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
            "deletionDelaySeconds": _optional(COUNT), "gatewayClassName": NAME, "stepSizePercent": PERCENT,
            "intervalSeconds": POSITIVE, "maxSurgePercent": PERCENT,
        }),
        "gcsFaultTolerance": closed({
            "enabled": BOOLEAN, "redisAddress": STRING, "redisUsername": _secret("secretKey"),
            "redisPassword": _secret("secretKey"), "externalStorageNamespace": STRING,
        }),
        "rayAuth": closed({"mode": one_of("token", "disabled"), "secretName": NAME}),
        "service": closed({"type": one_of("ClusterIP", "NodePort", "LoadBalancer"), "annotations": LABELS}),
        "route": closed({
            "gateway": closed({**route, "parentRefs": GATEWAYS, "hostnames": listed(NAMED)}),
            "ingress": closed({**route, "className": NAME, "host": STRING, "tlsSecretName": NAME}),
        }),
        "networkPolicy": _network(),
        "podDisruptionBudget": closed({"enabled": BOOLEAN, "maxUnavailable": COUNT}),
        "podMonitor": closed({"enabled": BOOLEAN, "interval": NAMED, "labels": LABELS}),
        "serviceAccount": closed({"create": BOOLEAN, "name": NAME, "annotations": LABELS}),
        "probes": closed({"startupSeconds": POSITIVE}),
        "podSecurity": closed({
            **{name: {"type": "integer", "minimum": 1} for name in ("runAsUser", "runAsGroup", "fsGroup")},
            "fsGroupChangePolicy": one_of("OnRootMismatch", "Always"),
        }),
        "scratch": closed({"tmpSize": QUANTITY}),
        **dict.fromkeys(("commonLabels", "schedulingLabels", "annotations"), LABELS),
        "extraObjects": listed({"type": "object", "required": ["apiVersion", "kind", "metadata"]}),
        "global": {"type": "object"},  # Helm's own, which every chart gets
    }  # fmt: skip
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": SHARED, **closed(properties)}


def values_table(text: str) -> str:
    """Markdown: each value with a `# --` comment, its default and the comment."""
    rows, comment = ["| value | default | |", "|---|---|---|"], ""
    path: list[str] = []
    defaults = yaml.safe_load(text)
    for line in text.splitlines():
        if said := re.match(r"\s*# -- (.*)", line):
            comment = said[1]
        elif comment and (more := re.match(r"\s*# (.*)", line)):
            comment += " " + more[1]
        elif found := re.match(r"( *)([\w.]+):", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            if comment:
                value: Any = defaults
                for name in path:
                    value = value[name]
                rows.append(f"| `{'.'.join(path)}` | `{json.dumps(value)}` | {comment} |")
            comment = ""
    return "\n".join(rows) + "\n"


def generated() -> dict[Path, str]:
    """What the files should hold."""
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(_TABLE[0])
    after = rest.partition(_TABLE[1])[2]
    table = values_table((CHART / "values.yaml").read_text(encoding="utf-8"))
    return {
        CHART / "values.schema.json": json.dumps(values_schema(), indent=1, sort_keys=True) + "\n",
        CHART / "README.md": before + _TABLE[0] + table + _TABLE[1] + after,
    }


def main(arguments: list[str]) -> int:
    """Write the files, or say which are stale."""
    stale = {path: text for path, text in generated().items() if not path.exists() or path.read_text() != text}
    if "--check" in arguments:
        for path in stale:
            print(f"{path} is stale: run `make schema`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
