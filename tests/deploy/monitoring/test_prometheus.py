"""The Prometheus beside a server: its configuration, and the command."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from divisi.deploy.monitoring.prometheus import NoPrometheus, prepare, root_of
from tests.support.promtool import needs_promtool, promtool


@needs_promtool
def test_promtool_takes_the_configuration(tmp_path: Path) -> None:
    command = prepare(tmp_path / "new", "http://127.0.0.1:8000", "127.0.0.1:9099", key="secret")
    assert f"--config.file={tmp_path}/new/prometheus.yaml" in command
    done = promtool("check", "config", str(tmp_path / "new" / "prometheus.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 rules found" in done.stdout
    written = yaml.safe_load((tmp_path / "new" / "prometheus.yaml").read_text())
    assert written["scrape_configs"][0]["http_sd_configs"][0]["url"] == "http://127.0.0.1:8000/metrics/targets"
    key = tmp_path / "new" / "key"
    assert key.read_text() == "secret"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600, "nobody else may read the key"


def test_without_prometheus_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoPrometheus, match="apt-get install prometheus"):
        prepare(tmp_path / "new", "http://127.0.0.1:8000", "127.0.0.1:9099")


@pytest.mark.parametrize("url", ["http://h:1/v1", "http://h:1/v1/", "http://h:1"])
def test_the_root_of_an_api(url: str) -> None:
    assert root_of(url) == "http://h:1"
