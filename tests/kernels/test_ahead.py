"""Triton kernels compiled ahead: found instead of compiled, and nothing else is. No GPU is asked whether they run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import triton

from divisi.kernels.choice import kernels_here
from divisi.kernels.gpu import ahead, cache
from tests.kernels.test_triton import environment, run

STEPS = """
import sys
from pathlib import Path
from divisi.kernels.gpu import ahead
ahead.BUILT_AHEAD = Path(sys.argv[1])
from triton.backends.nvidia.compiler import CUDABackend
def refuse(self, stages, options, language):
    raise AssertionError("a kernel is compiled")
CUDABackend.add_stages = refuse
from divisi.benchmarks.gpu import stub_driver
from divisi.benchmarks.gpu.ahead import BF16, CHIPS, CPU, DECODED, LAUNCHED, Ones, Published
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from tests.support.decode_variants import LATER
stub_driver.install(90)
kernels = assembled({"triton": triton_operations(CHIPS[90])}, "triton")
model = Published(kernels)
for rows, pages in (*DECODED, *LATER):
    model.decode(rows, pages)
for rows in ([3], [96], [900], [30] * 16, [1000] * 3, [4096]):
    model.scan(rows)
    model.share(3, sum(rows))
    model.share(2, len(rows))
if sys.argv[2:] == ["another shape"]:
    from divisi.benchmarks.gpu import cases
    cases.rms_norm(Ones(0, BF16, CPU), "", tokens=4, width=1024).run(kernels)
"""
"""Steps of the published shape where no kernel can be compiled."""


def test_it_is_looked_for_first_and_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, own = tmp_path / "built", tmp_path / "own"
    monkeypatch.setattr(cache, "BUILT_AHEAD", built)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(own))
    (built / "K").mkdir(parents=True)
    for name in ("__grp__a.json", "a.json", "a.cubin"):
        (built / "K" / name).touch()
    found = cache.CacheBehindBuilt("K").get_group("a.json")
    assert found == {name: str(built / "K" / name) for name in ("a.json", "a.cubin")}
    other = cache.CacheBehindBuilt("L")
    assert other.get_group("a.json") is None
    other.put_group("a.json", {"a.cubin": other.put(b"x", "a.cubin")})
    assert other.get_group("a.json") == {"a.cubin": str(own / "L" / "a.cubin")}
    assert not (built / "L").exists()


def test_it_is_used_where_it_is_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    monkeypatch.setattr(ahead, "BUILT_AHEAD", tmp_path / "none")
    cache.use_built()
    assert triton.knobs.cache.manager_class is None
    assert kernels_here("auto", "cuda") == "Triton"
    monkeypatch.setattr(ahead, "BUILT_AHEAD", tmp_path)
    cache.use_built()
    assert triton.knobs.cache.manager_class is cache.CacheBehindBuilt
    assert "compiled ahead (no GPU has run it so)" in kernels_here("auto", "cuda")


@pytest.mark.verify
@pytest.mark.part("chart")
@pytest.mark.timeout(900)
def test_steps_of_the_published_shape_compile_nothing(
    tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    built = tmp_path / "built"
    said = run(sys.executable, "-m", "divisi.benchmarks.gpu.ahead", str(built), "--chips", "90")
    record_result("said", said.strip())
    record_result("MB", round(sum(file.stat().st_size for file in built.rglob("*")) / 1e6, 1))
    elsewhere = {"TRITON_CACHE_DIR": str(tmp_path / "own")}
    run(sys.executable, "-c", STEPS, str(built), **elsewhere)
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(built), "another shape"], env=environment(**elsewhere), capture_output=True,
        text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode != 0
    assert "a kernel is compiled" in done.stderr
    targets = {json.loads(file.read_text())["target"]["arch"] for file in built.glob("*/*.json") if file.name[0] != "_"}
    assert targets == {90}
