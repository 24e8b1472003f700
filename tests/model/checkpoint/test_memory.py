"""A shard reads and keeps its share of the experts, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from divisi.model.checkpoint.layout import ExpertLayout
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

MIB = 2**20
# 96 MiB of experts
CONFIG_JSON = SMALL_CONFIG | {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 64}
LOAD = '''
import gc, json, sys
from pathlib import Path
import torch
from divisi.kernels.select import select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import shard_experts

def resident():
    """Bytes of anonymous memory: pages of files, such as libraries, are shared and can be dropped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

path, shard, shards = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config, device = ModelConfig.load(path), torch.device("cpu")
kernels = select_kernels(device)
checkpoint = Checkpoint.open(path)
before = resident()
bank = ExpertBank.load(checkpoint, config, shard_experts(config, shards)[shard], kernels, torch.bfloat16, device)
read = checkpoint.bytes_read
del checkpoint
gc.collect()
print(json.dumps({"read": read, "kept": bank.nbytes, "rss": resident() - before}))
'''


@pytest.mark.parametrize("layout", ["published", "packed"])
def test_a_shard_takes_its_share(
    layout: ExpertLayout, tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    config = write_random_checkpoint(tmp_path, CONFIG_JSON, layout=layout, tokenizer=False)
    experts = config.num_hidden_layers * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size * 2

    def load(shard: int, shards: int) -> dict[str, int]:
        command = [sys.executable, "-c", LOAD, str(tmp_path), str(shard), str(shards)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
        measured: dict[str, int] = json.loads(done.stdout)
        record_result(f"shard {shard} of {shards}, MiB", {k: round(v / MIB, 1) for k, v in measured.items()})
        return measured

    for shards in (1, 4):
        measured = load(shards - 1, shards)
        assert measured["read"] == measured["kept"] == experts // shards
        assert measured["rss"] < experts // shards + 12 * MIB


GROW = LOAD.partition("path, shard")[0] + """
import threading
from divisi.model.placement import share_of

config, device = ModelConfig.load(sys.argv[1]), torch.device("cpu")
checkpoint, told, done = Checkpoint.open(sys.argv[1]), [], threading.Event()
before = resident()

def watch():
    while not done.wait(0.0005):
        told.append(resident() - before)

def peak(leaves):
    del told[:]
    bank.hold(checkpoint, config, leaves)
    return max(told)

half, whole = range(16), range(32)
bank = ExpertBank.load(
    checkpoint, config, share_of(config.num_experts, 32, half), select_kernels(device), torch.bfloat16, device
)
thread = threading.Thread(target=watch)
thread.start()
try:
    measured = {"kept": bank.nbytes, "growing": peak(whole), "grown": resident() - before}
    measured |= {"shrinking": peak(half), "shrunk": resident() - before}
finally:
    done.set()
    thread.join()
print(json.dumps(measured))
"""


@pytest.mark.verify
def test_while_experts_come_and_go_one_layer_is_there_twice(
    tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    config = write_random_checkpoint(tmp_path, CONFIG_JSON, tokenizer=False)
    layer = config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size * 2
    whole = config.num_hidden_layers * layer
    done = subprocess.run(
        [sys.executable, "-c", GROW, str(tmp_path)], check=True, capture_output=True, text=True, timeout=100
    )
    measured: dict[str, int] = json.loads(done.stdout)
    record_result("half of the experts, all, and half again, MiB", {k: round(v / MIB, 1) for k, v in measured.items()})
    assert measured["kept"] == whole // 2
    assert measured["growing"] < whole + layer + 12 * MIB
    assert measured["grown"] < whole + 12 * MIB
    assert measured["shrinking"] < whole + layer + 12 * MIB
    assert measured["shrunk"] < whole // 2 + 12 * MIB
