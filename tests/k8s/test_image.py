"""The image as its Dockerfile and install script make it: it serves without rights, compiler and network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import httpx
import pytest

from divisi.kernels.native.variants import VARIANTS, runnable_variants
from tests.k8s.helm import ROOT
from tests.k8s.image import USER, Image, built
from tests.support.lab import Machine, lab

SPEED = ROOT / "tests" / "k8s" / "decode_speed.py"
ROUNDS = 21
MASKS = {
    "unmasked": ("", {}),
    "v3": (r"avx512\w*|amx\w*|avx_vnni", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "v2": (
        r"avx\w*|amx\w*|fma|f16c|bmi[12]|abm|movbe",
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    ),
}
"""The flags that a processor is said not to have, as /proc/cpuinfo tells them and by what torch asks it itself."""

LOOK = """
echo "user: $(id -u)"
echo "builds: $(python -P -c '
from divisi.kernels.native.build import BUILT_AHEAD, file_name
from divisi.kernels.native.variants import VARIANTS
print(*(name for name, variant in VARIANTS.items() if (BUILT_AHEAD / file_name(variant)).exists()))')"
echo "compilers: $(command -v cc gcc g++ c++ clang make)"
echo "probes: "$(command -v bash wget)
echo "written: $(for folder in / /opt/divisi /opt/divisi/divisi-demo /etc /var/tmp; do
  touch $folder/x 2>/dev/null && echo $folder; done)"
echo "routes: $(grep -cE '^[^[:space:]]+[[:space:]]00000000' /proc/net/route)"
"""
"""What a container says of itself."""


def test_both_targets_are_made_by_the_script() -> None:
    """And it is a shell's, whatever shell."""
    script, text = ROOT / "k8s/image/install.sh", (ROOT / "k8s/image/Dockerfile").read_text()
    subprocess.run(["sh", "-n", str(script)], check=True)
    stages = {}
    for part in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        stages[head.split(" AS ")[1]] = body
    for target in ("cpu", "cuda"):
        assert "/source/k8s/image/install.sh /opt/divisi /source" in stages[f"build-{target}"]
        assert f"COPY --from=build-{target} /opt/divisi /opt/divisi" in stages[target]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    with built(tmp_path_factory.mktemp("image")) as made:
        yield made


verify = [pytest.mark.verify, pytest.mark.timeout(1800)]


class TestImage:
    pytestmark = verify

    def test_it_holds_all_builds_and_no_compiler(self, image: Image, tmp_path: Path) -> None:
        with lab(tmp_path) as made:
            machine = made.machine("pod")
            process = image.start(machine, ["bash", "-c", LOOK])
            assert process.wait(120) == 0, machine.tail()
            machine.processes.clear()
            said = dict(line.split(": ", 1) for line in machine.tail().splitlines())
        assert said["user"] == str(USER)
        assert said["builds"].split() == list(VARIANTS)
        assert said["compilers"] == ""
        assert said["probes"].split() == ["/usr/bin/bash", "/usr/bin/wget"]
        assert said["written"] == ""
        assert said["routes"] == "0"

    @pytest.mark.parametrize("flags", MASKS)
    def test_it_serves(
        self, flags: str, image: Image, tmp_path: Path, record_result: Callable[[str, object], None]
    ) -> None:
        pattern, told = MASKS[flags]
        mask = (
            rf"sed -E '/^flags/ s/ ({pattern})\b//g' /proc/cpuinfo > /run/cpuinfo; "
            "mount --bind /run/cpuinfo $root/proc/cpuinfo"
        )
        best = runnable_variants()[0].name
        expected = {"unmasked": f"C++ {best}", "v3": "C++ avx2", "v2": "the references, since there is no g++"}[flags]
        command = ["divisi", "serve", "--host", "0.0.0.0", "--port", "8000", "--kv-memory", "64MiB", "--max-seqs", "4"]
        with lab(tmp_path) as made:
            machine = made.machine("pod")
            process = image.start(machine, command, mask if pattern else "", RAY_ADDRESS="local", **told)
            until = time.monotonic() + 200
            url = f"http://{machine.address}:8000/v1"
            while not is_ready(url):
                assert process.poll() is None, machine.tail()
                assert time.monotonic() < until, machine.tail()
                time.sleep(0.2)
            body = {"model": "divisi-demo", "prompt": "Hello", "max_tokens": 16, "temperature": 0}
            answer = httpx.post(f"{url}/completions", json=body, timeout=60).json()["choices"][0]["text"]
            (said,) = re.findall(r"^  kernels: (.*)$", machine.log.read_text(errors="replace"), re.MULTILINE)
            record_result("image", image.name)
            record_result("kernels", said)
            assert said == expected
            assert answer

    def test_decode_is_as_fast_as_a_native_build(
        self, image: Image, tmp_path: Path, record_result: Callable[[str, object], None]
    ) -> None:
        """The same sources with `-march=native`, turn by turn, one thread each."""
        compiled = tmp_path / "own"
        (packages,) = (image.root / "opt/divisi/lib").glob("python*/site-packages")
        command = [sys.executable, "-S", "-P", str(SPEED), "build", str(compiled)]  # without this checkout
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(packages)}, check=True, capture_output=True)
        with lab(tmp_path) as made:
            pairs = [Timed(made.machine(kind), image, kind, compiled) for kind in ("ahead", "native")]
            ahead, native = pairs
            assert ahead.build != native.build
            ratios = []
            for number in range(ROUNDS + 1):
                first, second = (pairs, pairs[::-1])[number % 2]
                seconds = {timed.kind: timed.seconds() for timed in (first, second)}
                if number:  # the first warms up
                    ratios.append(seconds["native"] / seconds["ahead"])
            record_result("image", image.name)
            record_result("kernels", [ahead.build, native.build])
            record_result("speed, times of native's: median, least, most", [median(ratios), min(ratios), max(ratios)])
            assert median(ratios) >= 0.95, ratios


class Timed:
    """`decode_speed.py` in a container."""

    def __init__(self, machine: Machine, image: Image, kind: str, compiled: Path) -> None:
        self.kind = kind
        more = (
            f"cp {SPEED} $root/tmp/speed.py; mkdir $root/tmp/home/.cache; "
            f"cp -r {compiled} $root/tmp/home/.cache/divisi; chown -R {USER} $root/tmp/home"
        )
        command = ["python", "-P", "/tmp/speed.py", "time", kind, "/opt/divisi/divisi-demo"]
        script = image.command(command, more, {"OMP_NUM_THREADS": "1"})
        own = ["unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child", *script]
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", machine.name, *own], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.build = Path(self._line()).name

    def seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "it has ended"
        return line.strip()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False  # not listening yet
