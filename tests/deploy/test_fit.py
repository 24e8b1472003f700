"""What settings leave open: the context that the KV pages hold, the dtype that the device has kernels for."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from divisi.cluster.engine.memory.budget import MemoryBudget
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import Request, Sampling
from divisi.deploy.cli import main
from divisi.deploy.fit import fit
from divisi.deploy.serve_app import gang_spec
from divisi.deploy.settings import Settings, SettingsError
from divisi.model.config import ModelConfig
from divisi.model.errors import ConfigError
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

POSITIONS = int(SMALL_CONFIG["max_position_embeddings"])
CONFIG = ModelConfig.from_hf(SMALL_CONFIG)
PAGE = 16 * CONFIG.kv_values_per_token * 2
"""Bytes of a page of 16 tokens in bfloat16."""


def settings(*, dtype: str = "auto", length: int | None = None, device: str = "cpu", **cache: object) -> Settings:
    model = {"model_dir": "/m", "dtype": dtype, "max_model_len": length}
    off = {"max_draft_tokens": 0}  # of a model that cannot draft, a note would say so
    return Settings.from_args({"model": model, "gang": {"device": device}, "cache": cache, "mtp": off})


@pytest.mark.parametrize(("gpus", "device"), [(2, "cpu"), (3, "cuda"), (9, "cuda")])
def test_gpus_for_the_workers_of_the_beginning_are_enough(gpus: int, device: str) -> None:
    gang = {"expert_shards": 2, "autoscaling": {"min": 1, "max": 4}}
    assert fit(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang}), CONFIG, gpus).device == device


def test_no_policy_has_more_shards_than_the_model_has_experts() -> None:
    gang = {"expert_autoscaling": {"max": 17}}
    with pytest.raises(SettingsError, match=r"expert_autoscaling\.max: 17 is more than the model's 16 experts; lower"):
        fit(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang}), CONFIG, 0)


@pytest.mark.parametrize(("workers", "told"), [(1, False), (8, False), (16, True)])
def test_a_budget_that_leaves_prompts_nothing_is_told(workers: int, told: bool) -> None:
    gang = {"expert_shards": 1, "attention_workers": workers, "device": "cpu"}
    off = {"max_draft_tokens": 0}
    fitted = fit(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang, "mtp": off}), CONFIG, 0)
    assert any("1024 would be better" in note for note in fitted.notes) == told


def test_drafts_need_an_mtp_layer() -> None:
    drafting = Settings.from_args({"model": {"model_dir": "/m"}, "gang": {"device": "cpu"}})
    without = fit(drafting, CONFIG, 0)
    assert (without.max_draft_tokens, len(without.notes)) == (0, 1)
    assert "no MTP layer" in without.notes[0]
    with_layer = ModelConfig.from_hf(SMALL_CONFIG, 1)
    assert (fit(drafting, with_layer, 0).max_draft_tokens, fit(drafting, with_layer, 0).notes) == (3, ())
    assert with_layer.kv_values_per_token > CONFIG.kv_values_per_token
    assert with_layer.with_mtp(False) == CONFIG
    two = ModelConfig.from_hf(SMALL_CONFIG, 2)
    with pytest.raises(ConfigError, match=r"mtp.layers.1 = '2 layers': more than one MTP layer is not supported"):
        two.with_mtp(True)
    assert two.with_mtp(False) == CONFIG


@pytest.mark.parametrize(("dtype", "pages"), [("bfloat16", 20), ("float32", 10)])
def test_an_open_context_is_what_the_pages_hold(dtype: str, pages: int) -> None:
    fitted = fit(settings(dtype=dtype, kv_memory=20 * PAGE + 5), CONFIG, 0)
    assert fitted.max_model_len == pages * 16 < POSITIONS
    (note,) = fitted.notes
    assert f"{pages * 16} tokens" in note
    assert str(POSITIONS // 16 * PAGE * 20 // pages) in note
    roomy = fit(settings(dtype=dtype, kv_memory=POSITIONS // 16 * PAGE * 2), CONFIG, 0)
    assert (roomy.max_model_len, roomy.notes) == (POSITIONS, ())


def test_deterministic_kernels_are_those_of_a_cpu() -> None:
    gang = {"deterministic": True}
    assert fit(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang}), CONFIG, 8).device == "cpu"
    with pytest.raises(SettingsError, match=r"gang.deterministic: True .* gang.device is 'cuda'; use device 'cpu'"):
        fit(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang | {"device": "cuda"}}), CONFIG, 8)


@pytest.mark.parametrize(
    ("gang", "gpus", "says"),
    [
        ({"kernels": "triton"}, 0, "gang.kernels: 'triton' names 'triton', which needs a GPU, and .* 'cpu'; use"),
        ({"kernels": "auto,route=native"}, 1, "names 'native', which needs a CPU, and gang.device is 'cuda'"),
        ({"kernels": "route=reference", "deterministic": True}, 0, "are not deterministic; use 'auto', or leave"),
    ],
)
def test_kernels_that_the_device_cannot_have(gang: dict[str, object], gpus: int, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        fit(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang}), CONFIG, gpus)


@pytest.mark.parametrize(
    ("gang", "gpus", "says"),
    [
        ({"topology": "split", "expert_shards": 2}, 3, "'always' is for expert shards on CPUs, .* has device 'cuda'"),
        ({}, 0, "has topology 'local'; leave it 'auto'"),
        ({"topology": "colocated", "attention_workers": 2}, 0, "has topology 'colocated'"),
    ],
)
def test_micro_batches_are_for_shards_on_cpus(gang: dict[str, object], gpus: int, says: str) -> None:
    always = Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang | {"micro_batches": "always"}})
    with pytest.raises(SettingsError, match=f"gang.micro_batches: .*{says}"):
        fit(always, CONFIG, gpus)
    fit(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang}), CONFIG, gpus)


def test_the_kernels_reach_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    gang = {"device": "cpu", "kernels": "auto,route=reference"}
    settings = Settings.from_args({"model": {"model_dir": str(tmp_path)}, "gang": gang})
    assert gang_spec(settings, 0).kernels == "auto,route=reference"


@pytest.mark.parametrize("page_size", [1, 16, 23])
def test_a_request_that_leaves_max_tokens_open_is_taken(page_size: int) -> None:
    chosen = settings(kv_memory=3 * PAGE + 2**16, page_size=page_size, max_seqs=4)
    length = fit(chosen, CONFIG, 0).max_model_len
    sizes = {"page_size": page_size, "max_seqs": 4, "max_model_len": length}
    plan = MemoryBudget.of(CONFIG, kv_memory=chosen.cache.kv_memory, dtype=torch.bfloat16, **sizes)
    assert length == plan.num_tokens, "the torch-free arithmetic is that of the store"
    limits = SchedulerConfig(
        vocab_size=CONFIG.vocab_size, num_pages=plan.num_pages, num_slots=plan.num_slots, max_step_tokens=8, **sizes
    )
    scheduler = Scheduler(limits)
    scheduler.submit(Request("open", (1, 2, 3), length - 3, Sampling()))
    scheduler.submit(Request("whole", (1,) * length, 0, Sampling(), prompt_logprobs=0))
    with pytest.raises(RequestRejected):
        scheduler.submit(Request("long", (1,) * length, 1, Sampling()))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"length": 1000, "kv_memory": 62 * PAGE}, ["cache.kv_memory", f"{63 * PAGE} bytes", "992 or less"]),
        ({"page_size": 4096, "kv_memory": 2**16}, ["cache.kv_memory", f"at least {256 * PAGE}", "cache.page_size"]),
        ({"length": POSITIONS + 1}, ["model.max_model_len", f"{POSITIONS} positions"]),
        ({"dtype": "float16"}, ["model.dtype", "'float16'", "bfloat16"]),
        ({"dtype": "float16", "device": "auto"}, ["model.dtype"]),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        fit(settings(**changes), CONFIG, 0)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(caught.value)


def test_float16_is_for_gpus() -> None:
    half = ModelConfig.from_hf(SMALL_CONFIG | {"torch_dtype": "float16"})
    on_cpu = fit(settings(device="auto"), half, 0)
    assert (on_cpu.device, on_cpu.dtype) == ("cpu", "bfloat16")
    assert "float16" in on_cpu.notes[0]
    on_gpu = fit(settings(device="auto"), half, 1)
    assert (on_gpu.device, on_gpu.dtype, on_gpu.notes) == ("cuda", "float16", ())
    assert fit(settings(device="auto", dtype="float16"), CONFIG, math.inf).dtype == "float16"


def test_inspect_and_serve_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_random_checkpoint(tmp_path, SMALL_CONFIG | {"torch_dtype": "float16"}, seed=1)
    flags = ["--kv-memory", str(9 * PAGE), "--device", "cpu"]
    assert main(["inspect", str(tmp_path), *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    with caplog.at_level(logging.WARNING):
        spec = gang_spec(
            Settings.from_args(
                {"model": {"model_dir": str(tmp_path)}, "cache": {"kv_memory": 9 * PAGE}, "gang": {"device": "cpu"}}
            ),
            0,
        )
    assert (spec.dtype, spec.max_model_len) == (report["model"]["dtype"], report["model"]["max_model_len"])
    assert (spec.dtype, spec.max_model_len) == ("bfloat16", 9 * 16)
    assert report["ranks"][0]["tokens"] == 9 * 16
    assert [record.message for record in caplog.records] == report["notes"]
    assert main(["inspect", str(tmp_path), *flags]) == 0
    assert "up to 144 tokens" in capsys.readouterr().out


def test_a_colocated_gang_needs_a_gpu_and_an_expert_for_each_rank() -> None:
    def of(ranks: int, device: str = "auto") -> Settings:
        gang = {"topology": "colocated", "attention_workers": ranks, "device": device}
        return Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang})

    assert [fit(of(3), CONFIG, gpus).device for gpus in (2, 3)] == ["cpu", "cuda"]
    experts = CONFIG.num_experts
    fit(of(experts), CONFIG, 0)
    with pytest.raises(SettingsError, match=rf"gang.attention_workers: {experts + 1} .*{experts} experts"):
        fit(of(experts + 1), CONFIG, 0)


@pytest.mark.parametrize(("given", "threads"), [(None, None), (3, 3)])
def test_threads_are_left_to_the_machines_of_the_ranks(tmp_path: Path, given: int | None, threads: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    model, gang = {"model_dir": str(tmp_path)}, {"device": "cpu", "threads_per_process": given}
    assert gang_spec(Settings.from_args({"model": model, "gang": gang}), 0).threads == threads


def test_a_link_to_the_model_is_followed_where_the_ranks_run(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text(json.dumps(SMALL_CONFIG))
    (tmp_path / "model").symlink_to(tmp_path / "here")
    settings = Settings.from_args({"model": {"model_dir": str(tmp_path / "model")}, "gang": {"device": "cpu"}})
    assert gang_spec(settings, 0).model_dir == str(tmp_path / "model")
