"""What a pod is given: grace, HAProxy, files, models, rights; and what is asked of its readiness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from divisi.deploy.haproxy.environment import HEAD_BYTES, environment
from divisi.deploy.settings import Settings
from tests.k8s.helm import (
    PRESETS,
    at,
    merged,
    one,
    pods_of,
    preset,
    render,
    service_of,
    settings_of,
)  # fmt: skip
from tests.k8s.releases import (
    INCREMENTAL,
    PREFETCH,
    container,
    env,
)


@pytest.mark.parametrize(
    ("grace", "termination", "delay"), [(None, 40, 60), (0, 30, 60), (10.5, 41, 60), (600, 630, 630)]
)
def test_grace_periods_follow_the_settings(grace: float | None, termination: int, delay: int) -> None:
    manifests = render({} if grace is None else at("divisi.limits.shutdown_grace_s", grace))
    settings = Settings.from_args(settings_of(manifests))
    for name, pod in pods_of(manifests).items():
        assert pod["spec"]["terminationGracePeriodSeconds"] == termination
        if name != "head":
            command = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
            within = float(command[command.index("--within") + 1])
            assert settings.limits.shutdown_grace_s + 13 < within < termination  # Serve's own limit of a replica's end
    assert service_of(manifests)["rayClusterDeletionDelaySeconds"] == delay


@pytest.mark.parametrize("timeout_s", [None, 60, 7200.5])
def test_haproxy_is_told_what_divisi_tells_it(timeout_s: float | None) -> None:
    """In every pod: Ray's head reads it too."""
    limits = {} if timeout_s is None else at("divisi.limits.request_timeout_s", timeout_s)
    folder = Path("/run/divisi/haproxy")
    told = environment(folder, folder / "haproxy", range(30_000, 30_300), timeout_s or 3600.0)
    told["RAY_SERVE_HAPROXY_MAXCONN"] = "4096"  # the pod's limit of open files is KubeRay's
    assert int(told["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]) > HEAD_BYTES
    for pod in pods_of(render(limits)).values():
        said = {name: value for name, value in env(pod).items() if name.startswith("RAY_SERVE_")}
        assert said == told
        (prepared,) = pod["spec"]["initContainers"]
        assert prepared["args"] == ["0.0.0.0", "8000", str(folder)]


def test_without_haproxy_nothing_of_it_is_there() -> None:
    for pod in pods_of(render(at("haproxy.enabled", False))).values():
        assert {name: value for name, value in env(pod).items() if "SERVE" in name} == {
            "RAY_SERVE_ENABLE_HA_PROXY": "0"
        }
        assert "initContainers" not in pod["spec"]


SECRETS = {
    "apiKeys": {"secretName": "keys", "secretKey": "k.yaml"}, "gang": {"secretName": "gang", "secretKey": "s"},
    "tls": {"secretName": "tls"},
}  # fmt: skip


def test_files_from_secrets_are_where_the_settings_say() -> None:
    manifests = render(at("secrets", SECRETS))
    settings = Settings.from_args(settings_of(manifests))
    assert settings.gang.tls is not None
    files = [
        settings.auth.api_keys_file,
        settings.gang.secret_file,
        settings.gang.tls.certificate,
        settings.gang.tls.key,
        settings.gang.tls.ca,
    ]
    for pod in pods_of(manifests).values():
        secrets = {volume["name"]: volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume}
        mounts = {
            mount["mountPath"]: secrets[mount["name"]]
            for mount in container(pod)["volumeMounts"]
            if mount["name"] in secrets
        }
        for file in files:
            assert str(Path(str(file)).parent) in mounts
        assert all(secret["defaultMode"] == 0o440 for secret in mounts.values())


@pytest.mark.parametrize("source", ["claim", "prefetch", "nodeCache", "hostPath"])
def test_the_model_is_where_the_settings_say_in_every_pod(source: str) -> None:
    """The build of the application runs on the head, and the ingress reads the tokenizer."""
    given = {"source": source, "claim": {"name": "claim"}, "hostPath": "/srv/models"}
    manifests = render(PREFETCH, {"model": given})
    model_dir = Settings.from_args(settings_of(manifests)).model.model_dir
    for name, pod in pods_of(manifests).items():
        (mount,) = [mount for mount in container(pod)["volumeMounts"] if mount["name"] == "model"]
        assert model_dir.is_relative_to(mount["mountPath"])
        assert mount["readOnly"]
        (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "model"]
        fetchers = [item for item in pod["spec"]["initContainers"] if item["name"] == "model"]
        if source == "nodeCache":  # a node with a GPU keeps the weights; the others need some kilobytes
            (fetcher,) = fetchers
            assert ("--without-weights" in fetcher["args"]) == (name in ("head", "ingress")) == ("emptyDir" in volume)
        elif source == "prefetch":
            (fetcher,) = fetchers
            assert "--wait" in fetcher["args"]
            assert volume["persistentVolumeClaim"]["claimName"] == "claim"
        else:
            assert not fetchers
    jobs = [manifest for manifest in manifests if manifest["kind"] == "Job"]
    assert len(jobs) == (source == "prefetch")


def test_a_prefetch_makes_a_claim_that_outlives_the_release() -> None:
    manifests = render(PREFETCH)
    claim = one(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    other = render(PREFETCH, at("model.prefetch.revision", "1" * 40))
    assert one(manifests, "Job")["metadata"]["name"] != one(other, "Job")["metadata"]["name"]  # a Job cannot be changed


def test_what_a_fetch_is_told_is_what_it_takes() -> None:
    from divisi.deploy.prefetch.__main__ import parser

    plain = {
        "source": "prefetch",
        "prefetch": {"repo": "", "revision": "", "url": "http://x/m"},
        "token": {"secretName": "t"},
    }
    cached = {"source": "nodeCache", "hostPath": "/srv/m"}
    told = [PREFETCH, merged(PREFETCH, {"model": cached}), merged(PREFETCH, {"model": plain})]
    for values in told:
        manifests = render(values)
        pods = [
            *pods_of(manifests).values(),
            *(item["spec"]["template"] for item in manifests if item["kind"] == "Job"),
        ]
        commands = [
            item for pod in pods for item in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
            if "divisi.deploy.prefetch" in item.get("command", [])
        ]  # fmt: skip
        assert commands
        for item in commands:
            assert str(parser().parse_args(item["args"]).to) == "/models/m"


@pytest.mark.parametrize("name", PRESETS)
def test_every_process_is_confined(name: str) -> None:
    """Not root, a read-only root, no capability, no service account's token; but folders to write in."""
    manifests = render(preset(name))
    pods = [*pods_of(manifests).values(), *(item for item in manifests if item["kind"] == "Pod")]
    for pod in pods:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for item in [*spec.get("initContainers", []), *spec["containers"]]:
            security = item["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert item["resources"]["limits"]["memory"]
    for pod in pods_of(manifests).values():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
        writable = {mount["mountPath"] for mount in container(pod)["volumeMounts"] if mount["name"] in volumes}
        assert writable == {"/tmp", "/run/divisi", "/dev/shm"}
        assert env(pod)["HOME"].startswith("/tmp/")


def test_locked_memory_and_rdma_are_for_those_who_ask() -> None:
    pods = pods_of(render(at("groups.experts", {"ipcLock": True, "extraResources": {"rdma/hca": 1}})))
    assert container(pods["experts"])["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert container(pods["experts"])["resources"]["limits"]["rdma/hca"] == "1"
    assert container(pods["attention"])["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_runtime_is_for_those_who_ask() -> None:
    pods = pods_of(render(at("groups.experts.runtimeClassName", "nvidia")))
    assert {name for name, pod in pods.items() if pod["spec"].get("runtimeClassName") == "nvidia"} == {"experts"}


def test_an_ingress_pod_is_ready_while_the_gang_serves() -> None:
    pods = pods_of(render())
    assert container(pods["ingress"])["readinessProbe"]["httpGet"]["path"] == "/v1/health/ready"
    for name in ("attention", "experts"):
        assert "8000" not in json.dumps(container(pods[name])["readinessProbe"])
    for pod in (pods[name] for name in ("ingress", "attention", "experts")):
        startup = container(pod)["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    # KubeRay's gateway goes by the pods that are ready, of all groups: those without HTTP must not be.
    moved = pods_of(render(INCREMENTAL))
    assert "8000" in json.dumps(container(moved["experts"])["readinessProbe"])


def test_the_service_has_the_ingress_pods_alone() -> None:
    manifests = render()
    selector = one(manifests, "Service")["spec"]["selector"].items()
    for name, pod in pods_of(manifests).items():
        assert (selector <= pod["metadata"]["labels"].items()) == (name == "ingress")
