"""The secret of a gang's doors: a file's, or one that is drawn once and kept with Ray's own state."""

from __future__ import annotations

from pathlib import Path

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from divisi.cluster.door import Secret
from divisi.cluster.spec import GangSpec

_NAMESPACE = b"divisi"


def gang_secret(spec: GangSpec) -> Secret:
    """The same in every process of the gang, whoever asks first and whichever of them is started anew.

    Ray's head keeps the drawn one, behind Ray's own authentication. Raises SecretError where a file cannot be used.
    """
    if spec.secret_file is not None:
        return Secret.load(Path(spec.secret_file))
    name = f"secret/{spec.name}".encode()
    _internal_kv_put(name, Secret.draw().key, overwrite=False, namespace=_NAMESPACE)
    return Secret(_internal_kv_get(name, namespace=_NAMESPACE))
