"""Where the application's deployments go, by the settings."""

from __future__ import annotations

from typing import Any

import pytest

from divisi.deploy import serve_app
from divisi.deploy.serve_app import build, build_from, gang_spec
from divisi.deploy.settings import Settings, SettingsError
from divisi.model.demo import checkpoint_dir

LABELS = {role: {"labels": {"divisi-role": role}} for role in ("ingress", "attention", "experts")}


def settings(**groups: Any) -> Settings:
    gang = {"topology": "split", "expert_shards": 2, "device": "cpu"} | groups.pop("gang", {})
    return Settings.from_args({"model": {"model_dir": str(checkpoint_dir())}, "gang": gang, **groups})


def options(made: Settings) -> dict[str, dict[str, Any]]:
    """Each deployment's `ray_actor_options`."""
    application: Any = build_from(made, gang_spec(made, 0))
    ingress = application._bound_deployment
    bound = [ingress, *(item._bound_deployment for item in ingress.init_args if hasattr(item, "_bound_deployment"))]
    return {deployment.name: deployment.ray_actor_options for deployment in bound}


def test_without_placement_an_ingress_takes_no_cpu() -> None:
    found = options(settings())
    assert {name: item["num_cpus"] for name, item in found.items()} == {"Ingress": 0, "AttentionWorker": 1, "Gang": 0}
    assert not any("label_selector" in item for item in found.values())


def test_each_role_is_sent_to_its_nodes() -> None:
    found = options(settings(placement=LABELS))
    assert {name: item["label_selector"] for name, item in found.items()} == {
        "Ingress": {"divisi-role": "ingress"}, "Gang": {"divisi-role": "ingress"},
        "AttentionWorker": {"divisi-role": "attention"},
    }  # fmt: skip
    assert found["Ingress"]["num_cpus"] == 1


def test_resources_are_taken_by_each_process() -> None:
    found = options(
        settings(placement={"ingress": {"resources": {"front": 1}}, "attention": {"resources": {"gpus": 2}}})
    )
    assert found["Ingress"]["resources"] == {"front": 1.0}
    assert found["AttentionWorker"]["resources"] == {"gpus": 2.0}
    assert not found["Gang"].get("resources")  # it would take what an ingress needs


def test_what_ray_counts_by_itself_is_no_resource_of_a_role() -> None:
    with pytest.raises(SettingsError, match=r"placement\.ingress: GPU is what Ray counts by itself"):
        settings(placement={"ingress": {"resources": {"GPU": 1}}})


@pytest.mark.parametrize(
    ("device", "autoscaler", "refused"), [("auto", True, True), ("auto", False, False), ("cpu", True, False)]
)
def test_auto_is_refused_where_nodes_may_come(
    device: str, autoscaler: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_app, "has_autoscaler", lambda: autoscaler)
    monkeypatch.setattr(serve_app, "living_nodes", list)
    monkeypatch.setattr(serve_app.ray, "cluster_resources", dict)
    args = settings(gang={"device": device}).model_dump(mode="json", exclude_unset=True)
    if refused:
        with pytest.raises(SettingsError, match=r"gang\.device: 'auto'.*give 'cuda' or 'cpu'"):
            build(args)
    else:
        build(args)
