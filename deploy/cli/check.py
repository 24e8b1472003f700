"""What `divisi serve` and `divisi inspect` refuse before anything is started: one check for both, in about a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divisi.deploy.fit import Fit
    from divisi.deploy.settings import Settings
    from divisi.model.checkpoint import Checkpoint
    from divisi.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Checked:
    """A deployment whose settings and files fit each other."""

    settings: Settings
    """As given, with `cache.kv_memory` settled where a GPU settles it."""
    config: ModelConfig
    fitted: Fit
    checkpoint: Checkpoint
    """Its headers are read, its weights are not."""


def check_deployment(settings: Settings, num_gpus: float, gpu_memory: int | None = None) -> Checked:
    """Check every file that the settings name, against them and against each other. `num_gpus`: see `fit`.

    `gpu_memory` are the bytes of the GPUs that the ranks will have, if they are known to have any.

    What is not the files' matter is not checked: whether the machine has the GPUs and the port is free.

    Raises SettingsError, ConfigError, CheckpointError, TextError, KeyFileError, SecretError and LogFileError.
    """
    # Late: `divisi --help` should not take the seconds that importing torch takes.
    from divisi.cluster.door import Secret, TlsFiles
    from divisi.deploy.cli.card import kv_memory_left
    from divisi.deploy.fit import fit, used_model
    from divisi.deploy.limits import KeyFile
    from divisi.deploy.logs import check_log_file
    from divisi.model.text import TextCodec

    model_dir = settings.model.model_dir
    config = used_model(settings, model_dir)
    fitted = fit(settings, config, num_gpus)
    codec = TextCodec.load(model_dir)
    if codec.template is not None:
        codec.template.check()
    if settings.gang.secret_file is not None:
        Secret.load(settings.gang.secret_file)
    if (tls := settings.gang.tls) is not None:
        TlsFiles(str(tls.certificate), str(tls.key), str(tls.ca)).server_context()
    if settings.auth.api_keys_file is not None:
        KeyFile(settings.auth.api_keys_file)
    if settings.log.file is not None:
        check_log_file(settings.log.file)

    from divisi.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model_dir)
    checkpoint.check_all(config)
    if gpu_memory is not None and settings.cache.kv_memory is None and fitted.device == "cuda":
        left = kv_memory_left(settings, fitted, config, checkpoint, gpu_memory)
        settings = settings.model_copy(update={"cache": settings.cache.model_copy(update={"kv_memory": left})})
        fitted = fit(settings, config, num_gpus)
    return Checked(settings, config, fitted, checkpoint)
