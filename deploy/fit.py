"""Settles what settings leave open for a model and a cluster, and refuses what cannot work. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from divisi.deploy.settings import Settings, SettingsError
from divisi.kernels.choice import CPU_IMPLEMENTATIONS, KernelChoice
from divisi.model.config import DTYPE_BYTES, DType, ModelConfig

_SHORTEST = 2
"""Tokens of the shortest context that can answer: one of prompt, one of answer."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Where and how a model is served. `notes` tell people where that isn't what they may expect."""

    device: Literal["cpu", "cuda"]
    dtype: DType
    max_model_len: int
    """Longest prompt plus answer; one such sequence fits into the KV pages of a worker."""
    max_draft_tokens: int
    """0 where the checkpoint has no MTP layer."""
    notes: tuple[str, ...] = ()


def used_model(settings: Settings, model_dir: Path) -> ModelConfig:
    """The model, with its MTP layer where it is to draft. Raises ConfigError."""
    return ModelConfig.load(model_dir).with_mtp(settings.mtp.max_draft_tokens > 0)


def fit(settings: Settings, config: ModelConfig, num_gpus: float) -> Fit:
    """Fit a model into a cluster with `num_gpus` GPUs (infinity: not known yet); `config` is the `used_model`.

    Raises SettingsError.
    """
    gang, shape = settings.gang, settings.gang.shape
    field = "attention_workers" if shape.colocated else "expert_shards"
    if shape.expert_shards > config.num_experts:
        raise SettingsError(
            f"gang.{field}: {shape.expert_shards} is more than the model's {config.num_experts} experts; use fewer"
        )
    if shape.expert_shards > gang.virtual_shards:
        raise SettingsError(
            f"gang.{field}: {shape.expert_shards} is more than the {gang.virtual_shards} of gang.virtual_shards; raise "
            "that, which changes tokens in the last bits"
        )
    scaling = gang.expert_autoscaling
    if scaling is not None and scaling.max > config.num_experts:
        raise SettingsError(
            f"gang.expert_autoscaling.max: {scaling.max} is more than the model's {config.num_experts} experts; lower "
            "it"
        )
    if gang.deterministic and gang.device == "cuda":
        raise SettingsError(
            "gang.deterministic: True needs kernels that only CPUs have, and gang.device is 'cuda'; use device 'cpu', "
            "or leave deterministic off"
        )
    ranks_at_first = shape.size - shape.attention_workers + gang.first_workers
    on_gpu = num_gpus >= ranks_at_first and not gang.deterministic
    device = gang.device if gang.device != "auto" else ("cuda" if on_gpu else "cpu")
    if gang.dispatch == "all_to_all" and device == "cuda":
        raise SettingsError(
            "gang.dispatch: 'all_to_all' has no transport between GPUs yet; use 'broadcast' or 'auto', or device 'cpu'"
        )
    if gang.micro_batches == "always" and (device == "cuda" or gang.topology != "split"):
        where = "device 'cuda'" if device == "cuda" else f"topology {gang.topology!r}"
        raise SettingsError(
            f"gang.micro_batches: 'always' is for expert shards on CPUs, and the gang has {where}; leave it 'auto'"
        )
    _check_kernels(settings, device)
    dtype = settings.model.dtype if settings.model.dtype != "auto" else config.dtype
    notes = []
    if device == "cpu" and dtype == "float16":
        if settings.model.dtype != "auto":
            raise SettingsError(
                "model.dtype: a CPU has no kernels for 'float16'; use 'bfloat16', 'float32' or 'auto', or device 'cuda'"
            )
        dtype = "bfloat16"
        notes.append("The checkpoint is in float16, which the CPU kernels don't take: served in bfloat16")
    notes += _tight_budget(settings)
    length, note = _max_model_len(settings, config, dtype)
    drafts = settings.mtp.max_draft_tokens if config.mtp_layers else 0
    if settings.mtp.max_draft_tokens and not drafts:
        notes.append("The checkpoint has no MTP layer (no mtp.* tensors): multi-token prediction is off")
    return Fit(device, dtype, length, drafts, (*notes, note) if note else tuple(notes))


def _tight_budget(settings: Settings) -> list[str]:
    """A note where workers that are full of answers have no room for prompts in a step."""
    workers, cache = settings.gang.attention_workers, settings.cache
    if workers == 1 or cache.max_step_tokens // workers > cache.max_seqs:
        return []
    better = 2 * workers * cache.max_seqs
    return [
        f"cache.max_step_tokens={cache.max_step_tokens} is the budget of all {workers} attention workers: where each "
        f"runs cache.max_seqs={cache.max_seqs} sequences, no prompt is computed; {better} would be better"
    ]


def _check_kernels(settings: Settings, device: str) -> None:
    choice, named = settings.gang.kernels, KernelChoice.parse(settings.gang.kernels).implementations
    if settings.gang.deterministic and not named <= {"auto", *CPU_IMPLEMENTATIONS}:
        raise SettingsError(
            f"gang.kernels: {choice!r} are not deterministic; use 'auto', or leave gang.deterministic off"
        )
    wrong = named & ({"triton"} if device == "cpu" else CPU_IMPLEMENTATIONS)
    if wrong:
        other = "a GPU" if device == "cpu" else "a CPU"
        raise SettingsError(
            f"gang.kernels: {choice!r} names {wrong.pop()!r}, which needs {other}, and gang.device is {device!r}; "
            "use 'auto' or 'reference', or the other device"
        )


def _max_model_len(settings: Settings, config: ModelConfig, dtype: DType) -> tuple[int, str | None]:
    """The length asked for, or the longest that both the model and the KV pages take, and a note if the pages limit it.

    The scheduler takes a request only if its longest possible answer fits into the pages.
    """
    asked, positions = settings.model.max_model_len, config.max_position_embeddings
    if asked is not None and asked > positions:
        raise SettingsError(
            f"model.max_model_len: {asked} is more than the model's {positions} positions; give that or less"
        )
    page_size, memory = settings.cache.page_size, settings.cache.kv_bytes
    page_bytes = page_size * config.kv_values_per_token * DTYPE_BYTES[dtype]
    if not page_bytes:  # without full attention there is no KV
        return asked or positions, None

    def bytes_for(tokens: int) -> int:
        return -(-tokens // page_size) * page_bytes

    held = memory // page_bytes * page_size
    if held < _SHORTEST:
        raise SettingsError(
            f"cache.kv_memory: {memory} bytes hold no sequence, since a page of {page_size} tokens takes {page_bytes}; "
            f"give at least {bytes_for(_SHORTEST)}, better {bytes_for(asked or positions)}, or lower cache.page_size"
        )
    if asked is not None and asked > held:
        raise SettingsError(
            f"cache.kv_memory: {memory} bytes hold {held} tokens, and model.max_model_len={asked} needs "
            f"{bytes_for(asked)} bytes; raise cache.kv_memory to that, or lower model.max_model_len to {held} or less"
        )
    if asked is None and positions > held:
        note = (
            f"The longest prompt plus answer is {held:,} tokens, not the model's {positions:,}: "
            f"cache.kv_memory would have to be {bytes_for(positions)} bytes for that"
        )
        return held, note
    return asked or positions, None
