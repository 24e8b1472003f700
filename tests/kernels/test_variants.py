"""Builds for several processors: which of them is taken, where it comes from, and that all compile."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from divisi.kernels.choice import kernels_here
from divisi.kernels.native import build, variants
from divisi.kernels.native.variants import OWN, VARIANTS, find_variant, runnable_variants
from divisi.kernels.select import select_kernels

AVX2 = VARIANTS["avx2"].needs
AVX512 = VARIANTS["avx512"].needs


def on_processor(monkeypatch: pytest.MonkeyPatch, flags: frozenset[str]) -> None:
    monkeypatch.setattr(variants, "processor_flags", lambda: flags)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (AVX512 | {"avx512_bf16", "amx_bf16", "amx_tile"}, "amx"),
        (AVX512 | {"avx512_bf16", "amx_bf16"}, "avx512-bf16"),
        (AVX512 | {"amx_bf16", "amx_tile"}, "avx512"),
        (AVX512, "avx512"),
        (AVX2 | {"avx512_bf16"}, "avx2"),
        (AVX2, "avx2"),
        (AVX2 - {"fma"}, "own"),
        (frozenset(), "own"),
    ],
)
def test_the_fastest_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch, flags: frozenset[str], name: str) -> None:
    on_processor(monkeypatch, flags)
    assert find_variant().name == name


@pytest.mark.parametrize("allowed", [True, False])
def test_amx_is_for_processes_that_may_use_its_registers(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    monkeypatch.setattr(variants, "_told_flags", lambda: VARIANTS["amx"].needs)
    monkeypatch.setattr(variants, "_may_use_tiles", lambda: allowed)
    assert variants.processor_flags.__wrapped__() == VARIANTS["amx" if allowed else "avx512-bf16"].needs


def test_one_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_processor(monkeypatch, AVX2)
    with pytest.raises(ValueError, match=r"'avx512' need a processor with avx512bw, .*; use 'native'"):
        find_variant("avx512")
    with pytest.raises(ValueError, match="need a CPU"):
        select_kernels(torch.device("meta"), "avx2")


def test_what_is_in_use_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_processor(monkeypatch, AVX512)
    assert kernels_here("auto", "cpu") == "C++ avx512"
    assert kernels_here("avx2,route=reference", "cpu") == "C++ avx2, route by the references"
    assert kernels_here("auto", "cuda") == "Triton"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setattr(build, "BUILT_AHEAD", tmp_path)
    assert kernels_here("auto", "cpu") == "the references, since there is no g++"


def test_a_library_built_ahead_comes_before_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ahead, cache = tmp_path / "ahead", tmp_path / "cache"
    monkeypatch.setattr(build, "BUILT_AHEAD", ahead)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.NoCompilerError):
        build.find(OWN, cache)
    ahead.mkdir()
    (ahead / build.file_name(OWN)).touch()
    assert build.find(OWN, cache) == ahead / build.file_name(OWN)
    assert not cache.exists()


def test_a_library_is_named_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {build.file_name(variant) for variant in VARIANTS.values()}
    assert len(names) == len(VARIANTS)
    source = tmp_path / "native.cpp"
    source.write_text("// other")
    monkeypatch.setattr(build, "sources", lambda variant: [source])
    assert names.isdisjoint(build.file_name(variant) for variant in VARIANTS.values())


@pytest.mark.verify
def test_all_are_compiled_ahead_on_any_machine(tmp_path: Path) -> None:
    libraries = build.build_all(tmp_path)
    assert [library.name.rpartition("-")[0] for library in libraries] == [f"kernels-{name}" for name in VARIANTS]
    for variant, library in zip(VARIANTS.values(), libraries, strict=True):
        if variant in runnable_variants():
            assert hasattr(ctypes.CDLL(str(library)), "divisi_linear")
