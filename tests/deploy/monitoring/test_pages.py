"""What each kind of process shows is as Prometheus likes it."""

from __future__ import annotations

import pytest

from tests.support.metric_names import pages
from tests.support.promtool import needs_promtool, promtool


@needs_promtool
@pytest.mark.parametrize("role", ["ingress", "attention", "expert", "coordinator"])
def test_promtool_finds_nothing_to_complain_of(role: str) -> None:
    done = promtool("check", "metrics", stdin=pages()[role])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
