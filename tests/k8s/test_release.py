"""What the chart makes of values: settings, groups, pods, and what it refuses by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from divisi.deploy.haproxy.environment import HEAD_BYTES, environment
from divisi.deploy.settings import Settings
from tests.k8s.helm import (
    CHART,
    PRESETS,
    Manifest,
    Values,
    at,
    groups_of,
    helm,
    merged,
    one,
    pods_of,
    preset,
    refusal,
    render,
    service_of,
    settings_of,
)  # fmt: skip

CUDA = merged(at("divisi.gang.device", "cuda"), *(at(f"groups.{group}.accelerator.resource", "nvidia.com/gpu")
              for group in ("attention", "experts", "colocated")))  # fmt: skip
PREFETCH = {
    "model": {"source": "prefetch", "prefetch": {"repo": "o/m", "revision": "0" * 40}},
    "divisi": {"model": {"model_dir": "/models/m"}},
}
REDIS = merged(at("gcsFaultTolerance", {"enabled": True, "redisAddress": "redis:6379"}),
               at("networkPolicy.redis", [{"podSelector": {}}]))  # fmt: skip
SCALING = merged(at("autoscaling.enabled", True), at("networkPolicy.apiServer", [{"ipBlock": {"cidr": "10.0.0.1/32"}}]))
INCREMENTAL = merged(SCALING, at("upgrade", {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "g"}))


def container(pod: Manifest) -> Manifest:
    (found,) = pod["spec"]["containers"]
    return dict(found)


def env(pod: Manifest) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container(pod)["env"]}


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_settings_are_divisis(name: str) -> None:
    """And each role's label is that of a group of pods."""
    manifests = render(preset(name))
    settings = Settings.from_args(settings_of(manifests))
    placement, groups = settings.placement, groups_of(manifests)
    assert settings.gang.device in ("cpu", "cuda")
    roles = {"ingress": placement.ingress, "attention": placement.attention, "experts": placement.experts}
    wanted = {role: place.labels for role, place in roles.items() if place is not None}
    assert sorted(wanted) == (
        ["attention", "experts", "ingress"] if settings.gang.topology == "split" else ["attention", "ingress"]
    )
    assert sorted(map(str, wanted.values())) == sorted(str(group["labels"]) for group in groups.values())


def test_every_setting_gets_through() -> None:
    """All that a value can say is in the settings that come out, and large numbers are numbers."""
    values: Values = yaml.safe_load((Path(__file__).parent / "everything.yaml").read_text(encoding="utf-8"))
    args = settings_of(render(values))
    for group, fields in values["divisi"].items():
        for field, value in fields.items():
            assert args[group][field] == value, (group, field)
    assert Settings.from_args(args).cache.kv_memory == 17179869184
    assert "17179869184" in service_of(render(values))["serveConfigV2"]


@pytest.mark.parametrize(
    ("divisi", "pods"),
    [
        ({"attention_workers": 3, "expert_shards": 5}, {"ingress": 1, "attention": 3, "experts": 5}),
        ({}, {"ingress": 1, "attention": 1, "experts": 1}),
        ({"topology": "colocated", "attention_workers": 4}, {"ingress": 1, "colocated": 4}),
        ({"topology": "local"}, {"ingress": 1, "colocated": 1}),
    ],
)  # fmt: skip
def test_the_groups_are_the_topologys(divisi: Values, pods: dict[str, int]) -> None:
    manifests = render(at("divisi.gang", divisi))
    groups = groups_of(manifests)
    assert {name: group["replicas"] for name, group in groups.items()} == pods
    for group in groups.values():  # the operator wants both where nothing scales
        assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    shape = Settings.from_args(settings_of(manifests)).gang.shape
    assert shape.size == sum(count for name, count in pods.items() if name != "ingress")


@pytest.mark.parametrize(
    ("scaling", "pods"),
    [(False, (4, 4, 4)), (True, (1, 1, 4))],
    ids=["without Ray's autoscaler", "with it"],
)
def test_pods_for_as_many_workers_as_may_come(scaling: bool, pods: tuple[int, int, int]) -> None:
    values = merged(
        at("divisi.gang", {"expert_shards": 2, "autoscaling": {"min": 2, "max": 7}}),
        at("groups.attention.ranksPerPod", 2),
        SCALING if scaling else {},
    )
    manifests = render(values)
    group = groups_of(manifests)["attention"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == pods
    assert Settings.from_args(settings_of(manifests)).gang.attention_workers == 7


def test_a_pod_can_hold_several_ranks() -> None:
    ranks = {"attention": {"ranksPerPod": 2}, "experts": {"ranksPerPod": 4}}
    manifests = render(CUDA, at("divisi.gang", {"attention_workers": 3, "expert_shards": 8}), at("groups", ranks))
    groups = groups_of(manifests)
    assert (groups["experts"]["replicas"], groups["attention"]["replicas"]) == (2, 2)
    assert groups["experts"]["resources"] == {"CPU": "4", "GPU": "4"}
    assert container(groups["experts"]["template"])["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert groups["ingress"]["resources"] == {"CPU": "1"}


def test_nothing_of_ours_is_placed_on_the_head() -> None:
    cluster = service_of(render())["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service_of(render())["excludeHeadPodFromServeSvc"] is True
    assert "resources" not in cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:  # either, not both
        assert group["resources"]
        assert not group["rayStartParams"]


REFUSED = [
    ("fullnameOverride", at("fullnameOverride", "x" * 48)),
    ("fullnameOverride", at("fullnameOverride", "4-models")),
    ("divisi.model.model_dir", merged(PREFETCH, at("divisi.model.model_dir", "/elsewhere/m"))),
    ("model.claim.name", merged(PREFETCH, at("model.source", "claim"))),
    ("model.hostPath", merged(PREFETCH, at("model.source", "hostPath"))),
    ("model.hostPath", merged(PREFETCH, at("model.source", "nodeCache"))),
    ("model.prefetch.url", merged(PREFETCH, at("model.prefetch.url", "http://x/m"))),
    ("model.prefetch.repo", merged(PREFETCH, at("model.prefetch", {"repo": "", "revision": ""}))),
    ("model.prefetch.revision", merged(PREFETCH, at("model.prefetch.revision", ""))),
    ("model/prefetch/revision", merged(PREFETCH, at("model.prefetch.revision", "main"))),
    ("groups.attention.accelerator.resource", at("divisi.gang.device", "cuda")),
    ("groups.experts.accelerator.resource", at("groups.experts.accelerator.resource", "nvidia.com/gpu")),
    ("groups.experts.maxReplicas", merged(at("groups.experts.maxReplicas", 1), at("divisi.gang.expert_shards", 2))),
    ("divisi.gang.expert_shards", at("divisi.gang", {"topology": "colocated", "expert_shards": 2})),
    ("divisi.gang.attention_workers", at("divisi.gang", {"topology": "local", "attention_workers": 2})),
    ("divisi.gang.autoscaling", at("divisi.gang", {"topology": "colocated", "autoscaling": {"max": 2}})),
    ("divisi/gang/autoscaling", at("divisi.gang.autoscaling", {"min": 0, "max": 2})),
    ("groups.attention.maxReplicas", merged(
        at("groups.attention.maxReplicas", 2), at("divisi.gang.autoscaling", {"max": 3}),
    )),
    ("groups.experts.minReplicas", at("groups.experts", {"minReplicas": 4, "maxReplicas": 3})),
    ("upgrade.deletionDelaySeconds", {
        "upgrade": {"deletionDelaySeconds": 60}, "divisi": {"limits": {"shutdown_grace_s": 31}},
    }),
    ("upgrade.type", at("upgrade", {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "g"})),
    ("upgrade.gatewayClassName", merged(INCREMENTAL, at("upgrade.gatewayClassName", ""))),
    ("upgrade.stepSizePercent", merged(INCREMENTAL, at("upgrade", {"stepSizePercent": 50, "maxSurgePercent": 40}))),
    ("upgrade/intervalSeconds", merged(INCREMENTAL, at("upgrade.intervalSeconds", 0))),
    ("gcsFaultTolerance.redisAddress", at("gcsFaultTolerance.enabled", True)),
    ("gcsFaultTolerance.redisAddress", merged(REDIS, at("gcsFaultTolerance.redisAddress", "redis"))),
    ("networkPolicy.redis", merged(REDIS, at("networkPolicy.redis", []))),
    ("head.extraEnv", merged(REDIS, at("head.extraEnv", [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]))),
    ("head.extraEnv", merged(REDIS, at("head.extraEnv", [{"name": "REDIS_PASSWORD", "value": "x"}]))),
    ("head.extraEnv", merged(SCALING, at("head.extraEnv", [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]))),
    ("networkPolicy.apiServer", at("autoscaling.enabled", True)),
    (
        "divisi.auth.metrics_open",
        {"secrets": {"apiKeys": {"secretName": "k"}}, "divisi": {"auth": {"metrics_open": False}}},
    ),
    ("route.gateway.parentRefs", at("route.gateway.enabled", True)),
    ("podSecurity/runAsUser", at("podSecurity.runAsUser", 0)),
    ("rayClusterConfig", {"rayClusterConfig": {"upgradeStrategy": {}}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "values"), REFUSED, ids=[f"{index}-{names}" for index, (names, _) in enumerate(REFUSED)]
)
def test_what_the_operator_would_refuse_is_refused_by_name(names: str, values: Values) -> None:
    assert names in refusal(values)


@pytest.mark.parametrize("values", [PREFETCH, CUDA, REDIS, SCALING, INCREMENTAL, at("fullnameOverride", "x" * 47)])
def test_what_is_refused_with_an_error_is_taken_without(values: Values) -> None:
    assert refusal(values) == ""


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


@pytest.mark.parametrize("values", [{}, SCALING])
def test_the_autoscaler_is_the_newer_one(values: Values) -> None:
    cluster = service_of(render(values))["rayClusterConfig"]
    assert cluster.get("enableInTreeAutoscaling", False) is bool(values)
    assert cluster.get("autoscalerOptions", {}).get("version") == ("v2" if values else None)
    # Its head has the rights that KubeRay gives it; a name of our own would be without.
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert ("serviceAccountName" in head) is not bool(values)
    assert "restartPolicy" not in head


def test_ray_asks_for_a_token_and_redis_for_its_password() -> None:
    cluster = service_of(render(REDIS, at("gcsFaultTolerance.redisPassword.secretName", "redis")))["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    assert cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }


def test_routes_lead_to_the_service() -> None:
    gateway = {
        "enabled": True,
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["h.example.org"],
    }
    ingress = {"enabled": True, "className": "haproxy", "host": "h.example.org", "tlsSecretName": "tls"}
    manifests = render(at("route", {"gateway": gateway, "ingress": ingress}))
    service = one(manifests, "Service")["metadata"]["name"]
    (rule,) = one(manifests, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service, "port": 8000}]
    assert rule["timeouts"] == {"request": "0s"}  # a stream is as long as its answer
    (rule,) = one(manifests, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == service
    assert one(manifests, "Ingress")["spec"]["tls"] == [{"secretName": "tls", "hosts": ["h.example.org"]}]
    assert not [item for item in render() if item["kind"] in ("HTTPRoute", "Ingress")]


def test_budgets_are_the_groups() -> None:
    budgets = [item for item in render() if item["kind"] == "PodDisruptionBudget"]
    assert sorted(item["metadata"]["name"] for item in budgets) == [
        "divisi-attention",
        "divisi-experts",
        "divisi-ingress",
    ]


def test_labels_for_a_scheduler_are_on_the_service_of_ray() -> None:
    labels = one(render(at("schedulingLabels", {"kueue.x-k8s.io/queue-name": "gpus"})), "RayService")["metadata"][
        "labels"
    ]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"


def test_the_notes_have_a_call_that_works() -> None:
    notes = next(text for file, text in _texts({}).items() if file.endswith("NOTES.txt"))
    called = re.search(r"-d '(.*)'", notes)
    assert called is not None
    assert json.loads(called[1])["model"] == "divisi-demo"
    assert "Bearer" not in notes
    keyed = next(
        text for file, text in _texts(at("secrets.apiKeys.secretName", "keys")).items() if file.endswith("NOTES.txt")
    )
    assert "Bearer" in keyed


def _texts(values: Values) -> dict[str, Any]:
    rendered: dict[str, Any] = helm().Chart.load(str(CHART)).render(values, name="divisi", namespace="models")
    return rendered
