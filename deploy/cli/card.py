"""How much of a GPU's memory is left for KV pages. Late imports: `divisi --help` should not pay for torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from divisi.deploy.settings import SettingsError

if TYPE_CHECKING:
    from divisi.cluster.engine.memory.budget import MemoryBudget
    from divisi.deploy.fit import Fit
    from divisi.deploy.settings import Settings
    from divisi.model.checkpoint import Checkpoint
    from divisi.model.config import ModelConfig
    from divisi.model.placement import Role


def own_gpu_memory(settings: Settings) -> int | None:
    """Bytes of the smallest GPU here, if ranks will run on such; None where they may run elsewhere or on the CPU."""
    import torch

    gang, count = settings.gang, torch.cuda.device_count()
    if not count or gang.device == "cpu" or (gang.device == "auto" and count < gang.shape.size):
        return None
    return min(torch.cuda.get_device_properties(index).total_memory for index in range(count))


def kv_memory_left(
    settings: Settings, fitted: Fit, config: ModelConfig, checkpoint: Checkpoint, gpu_memory: int
) -> int:
    """Bytes for KV pages of the attention worker with the most weights, on a GPU of `gpu_memory` bytes.

    Each page brings the rotations of its positions along, up to the model's last one. Raises SettingsError where
    weights and state slots leave nothing.
    """
    from divisi.model.footprint.scratch import rotation_bytes
    from divisi.model.placement import Role

    shape, cache = settings.gang.shape, settings.cache
    virtual = settings.gang.virtual_shards
    roles = Role.all_of(config, shape.attention_workers, shape.expert_shards, shape.colocated, virtual)
    weights = max(weight_bytes(role, fitted, config, checkpoint) for role in roles if role.attention)
    budget = memory_budget(settings, fitted, config)
    states = budget.state_bytes
    usable = int(gpu_memory * cache.gpu_memory_fraction)
    left = usable - weights - states
    if left < 2**16:
        raise SettingsError(
            f"cache.gpu_memory_fraction: {cache.gpu_memory_fraction} of a GPU's {gpu_memory} bytes are {usable}, and "
            f"weights take {weights}, state slots {states} of them, so nothing is left for KV pages; share the experts "
            "out with gang.expert_shards, lower cache.max_seqs, or raise the fraction"
        )
    page, all_rotations = budget.bytes_per_page, rotation_bytes(config, config.max_position_embeddings)
    by_page = left * page // (page + rotation_bytes(config, cache.page_size)) if page else 0
    return max(left - all_rotations, by_page)


def weight_bytes(role: Role, fitted: Fit, config: ModelConfig, checkpoint: Checkpoint) -> int:
    """Of a rank's weights in memory."""
    from divisi.model.checkpoint import rank_tensors
    from divisi.model.config import DTYPE_BYTES
    from divisi.model.footprint.packing import packing_bytes

    total = packing_bytes(config, role) if (fitted.device, fitted.dtype) == ("cpu", "bfloat16") else 0
    for label, num_bytes in rank_tensors(config, checkpoint.tensors, role).items():
        disk = checkpoint.tensors[label.partition("[")[0]]
        total += num_bytes * DTYPE_BYTES[fitted.dtype] // (2 if disk.dtype in ("BF16", "F16") else 4)
    return total


def memory_budget(settings: Settings, fitted: Fit, config: ModelConfig) -> MemoryBudget:
    """How an attention worker's memory divides."""
    import torch

    from divisi.cluster.engine.memory.budget import MemoryBudget

    cache = settings.cache
    return MemoryBudget.of(
        config,
        kv_memory=cache.kv_bytes,
        page_size=cache.page_size,
        max_seqs=cache.max_seqs,
        max_model_len=fitted.max_model_len,
        dtype=getattr(torch, fitted.dtype),
        max_rows=1 + fitted.max_draft_tokens,
    )
