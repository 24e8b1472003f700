"""Closed JSON schemas of the pieces of Kubernetes' API that the values take as they are."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
NAMED: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
PERCENT: Schema = {"type": "integer", "minimum": 0, "maximum": 100}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}
"""Of an object; may be empty."""
QUANTITY: Schema = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?$"},
    ]
}


def closed(properties: dict[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """A mapping with these keys and no others."""
    return {
        "type": "object", "additionalProperties": False, "properties": properties,
        **({"required": list(required)} if required else {}),
    }  # fmt: skip


def listed(item: Schema) -> Schema:
    """A list of such items."""
    return {"type": "array", "items": item}


def mapped(value: Schema) -> Schema:
    """A mapping with any keys."""
    return {"type": "object", "additionalProperties": value}


def one_of(*values: str) -> Schema:
    """One of these words."""
    return {"type": "string", "enum": list(values)}


LABELS = mapped(STRING)
_REQUIREMENT = closed({"key": NAMED, "operator": NAMED, "values": listed(STRING)}, ("key", "operator"))
_LABEL_SELECTOR = closed({"matchLabels": LABELS, "matchExpressions": listed(_REQUIREMENT)})
_NODE_TERM = closed({"matchExpressions": listed(_REQUIREMENT), "matchFields": listed(_REQUIREMENT)})
_POD_TERM = closed(
    {
        "labelSelector": _LABEL_SELECTOR, "namespaceSelector": _LABEL_SELECTOR, "namespaces": listed(NAMED),
        "topologyKey": NAMED, "matchLabelKeys": listed(NAMED), "mismatchLabelKeys": listed(NAMED),
    },
    ("topologyKey",),
)  # fmt: skip
_WEIGHT: Schema = {"type": "integer", "minimum": 1, "maximum": 100}
_REQUIRED, _PREFERRED = (f"{kind}DuringSchedulingIgnoredDuringExecution" for kind in ("required", "preferred"))
_POD_AFFINITY = closed({
    _REQUIRED: listed(_POD_TERM),
    _PREFERRED: listed(closed({"weight": _WEIGHT, "podAffinityTerm": _POD_TERM}, ("weight", "podAffinityTerm"))),
})  # fmt: skip
AFFINITY = closed({
    "nodeAffinity": closed({
        _REQUIRED: closed({"nodeSelectorTerms": listed(_NODE_TERM)}, ("nodeSelectorTerms",)),
        _PREFERRED: listed(closed({"weight": _WEIGHT, "preference": _NODE_TERM}, ("weight", "preference"))),
    }),
    "podAffinity": _POD_AFFINITY,
    "podAntiAffinity": _POD_AFFINITY,
})  # fmt: skip
TOLERATIONS = listed(closed({
    "key": STRING, "operator": one_of("Exists", "Equal"), "value": STRING,
    "effect": one_of("NoSchedule", "PreferNoSchedule", "NoExecute"), "tolerationSeconds": COUNT,
}))  # fmt: skip
SPREAD = listed(
    closed(
        {
            "maxSkew": POSITIVE, "topologyKey": NAMED, "whenUnsatisfiable": one_of("DoNotSchedule", "ScheduleAnyway"),
            "labelSelector": _LABEL_SELECTOR, "minDomains": POSITIVE, "matchLabelKeys": listed(NAMED),
            "nodeAffinityPolicy": one_of("Honor", "Ignore"), "nodeTaintsPolicy": one_of("Honor", "Ignore"),
        },
        ("maxSkew", "topologyKey", "whenUnsatisfiable"),
    )
)  # fmt: skip
RESOURCES = closed({"requests": mapped(QUANTITY), "limits": mapped(QUANTITY)})
_KEY_OF = closed({"name": NAMED, "key": NAMED, "optional": BOOLEAN}, ("name", "key"))
ENV = listed(
    closed(
        {
            "name": NAMED, "value": STRING,
            "valueFrom": closed({
                "secretKeyRef": _KEY_OF, "configMapKeyRef": _KEY_OF,
                "fieldRef": closed({"fieldPath": NAMED, "apiVersion": NAMED}, ("fieldPath",)),
                "resourceFieldRef": closed(
                    {"resource": NAMED, "containerName": NAMED, "divisor": QUANTITY}, ("resource",)
                ),
            }),
        },
        ("name",),
    )
)  # fmt: skip
_ITEMS = listed(closed({"key": NAMED, "path": NAMED, "mode": COUNT}, ("key", "path")))
VOLUMES = listed(
    closed(
        {
            "name": NAMED,
            "configMap": closed({"name": NAMED, "items": _ITEMS, "defaultMode": COUNT, "optional": BOOLEAN}, ("name",)),
            "secret": closed(
                {"secretName": NAMED, "items": _ITEMS, "defaultMode": COUNT, "optional": BOOLEAN}, ("secretName",)
            ),
            "emptyDir": closed({"medium": STRING, "sizeLimit": QUANTITY}),
            "persistentVolumeClaim": closed({"claimName": NAMED, "readOnly": BOOLEAN}, ("claimName",)),
            "hostPath": closed({"path": NAMED, "type": STRING}, ("path",)),
            "nfs": closed({"server": NAMED, "path": NAMED, "readOnly": BOOLEAN}, ("server", "path")),
            "csi": closed(
                {"driver": NAMED, "readOnly": BOOLEAN, "fsType": STRING, "volumeAttributes": LABELS}, ("driver",)
            ),
        },
        ("name",),
    )
)
VOLUME_MOUNTS = listed(
    closed(
        {"name": NAMED, "mountPath": NAMED, "readOnly": BOOLEAN, "subPath": STRING, "mountPropagation": STRING},
        ("name", "mountPath"),
    )
)
PULL_SECRETS = listed(closed({"name": NAMED}, ("name",)))
PEERS = listed(
    closed({
        "podSelector": _LABEL_SELECTOR, "namespaceSelector": _LABEL_SELECTOR,
        "ipBlock": closed({"cidr": NAMED, "except": listed(NAMED)}, ("cidr",)),
    })
)  # fmt: skip
"""Of a network policy."""
GATEWAYS = listed(
    closed(
        {"name": NAMED, "namespace": NAMED, "sectionName": NAMED, "port": PORT, "group": STRING, "kind": NAMED},
        ("name",),
    )
)
