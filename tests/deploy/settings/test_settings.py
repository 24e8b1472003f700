"""Settings: merging, round trip, and messages that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
from divisi.cluster.seats import GangShape
from divisi.deploy.settings import CONFIG_VARIABLE, Settings, SettingsError, Surroundings, read_config_file
from divisi.deploy.settings.values import parse_bytes

TOML = '[model]\nmodel_dir = "/m/tiny"\n[gang]\nexpert_shards = 2\n[cache]\nkv_memory = "64MiB"\n'


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "divisi.toml"
    path.write_text(TOML)
    return path


def test_flags_win_over_the_file(config_file: Path) -> None:
    settings = Settings.load(config_file, {"cache": {"kv_memory": "2GiB", "page_size": None}, "http": {"port": 9000}})
    assert settings.cache.kv_memory == 2 * 2**30
    assert settings.cache.page_size == 16
    assert settings.http.port == 9000
    assert settings.gang.topology == "split"
    assert settings.served_model_name == "tiny"


def test_file_named_by_the_environment(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, str(config_file))
    assert Settings.load().gang.expert_shards == 2


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_text(json.dumps({"model": {"model_dir": "/m"}, "http": {"port": 1}}))  # JSON is YAML too
    assert Settings.load(path).http.port == 1


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
def test_a_file_may_begin_with_a_byte_order_mark(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"settings{suffix}"
    text = {".toml": "[http]\nport = 9", ".yaml": "http: {port: 9}", ".json": '{"http": {"port": 9}}'}[suffix]
    path.write_text(text, encoding="utf-8-sig")
    assert Settings.load(path, {"model": {"model_dir": "/m"}}).http.port == 9


def test_json_round_trip() -> None:
    settings = Settings.load(None, {"model": {"model_dir": "/m"}, "gang": {"topology": "split", "expert_shards": 3}})
    assert Settings.from_args(json.loads(settings.model_dump_json())) == settings


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("512MiB", 2**29), ("2 GiB", 2**31), ("1.5gb", 1_500_000_000), ("8K", 8192)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"model": {"model_dir": "/m", "dtyp": "x"}}, ["model.dtyp", "did you mean 'dtype'"]),
        ({"model": {"model_dir": "/m"}, "gagn": {"x": 1}}, ["gagn", "did you mean 'gang'"]),
        ({"model": {"model_dir": "/m"}, "cache": {"kv_memory": "lots"}}, ["cache.kv_memory", "'lots'", "512MiB"]),
        ({"model": {"model_dir": "/m"}, "cache": {"kv_memory": "-1"}}, ["cache.kv_memory", "'-1'"]),
        ({"model": {"model_dir": "/m"}, "http": {"port": 70000}}, ["http.port", "70000", "65535"]),
        ({"model": {"model_dir": "/m"}, "gang": {"topology": "local", "expert_shards": 2}}, ["gang", "'split'"]),
        ({"model": {"model_dir": "/m"}, "gang": {"topology": "split", "expert_shards": 0}}, ["expert_shards >= 1"]),
        ({"model": {"model_dir": "/m"}, "gang": {"attention_workers": 2}}, ["gang", "one process", "'colocated'"]),
        ({"model": {"model_dir": "/m"}, "gang": {"kernels": "rout=native"}}, ["gang.kernels", "'rout'", "use one of"]),
        ({"model": {"model_dir": "/m"}, "gang": {"kernels": "fast"}}, ["gang.kernels", "'fast'", "use 'auto'"]),
        ({"model": {"model_dir": "/m"}, "gang": {"expert_shards": 1, "rebalance": True}}, ["rebalance", "two expert"]),
        (
            {"model": {"model_dir": "/m"}, "gang": {"rebalance": True, "expert_autoscaling": {"max": 1}}},
            ["rebalance", "two expert", "got 1 at most"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"topology": "colocated", "expert_shards": 2}},
            ["gang", "expert_shards=2", "leave it out"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"expert_shards": 1, "autoscaling": {"min": 0, "max": 2}}},
            ["gang.autoscaling", "min=0", "nobody", "give 1 or more"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"expert_shards": 1, "autoscaling": {"min": 3, "max": 2}}},
            ["gang.autoscaling", "min=3", "max=2", "lower it"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"expert_shards": 1, "autoscaling": {"maxx": 2}}},
            ["gang.autoscaling.maxx", "did you mean 'max'"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"topology": "colocated", "autoscaling": {"max": 2}}},
            ["autoscaling", "'colocated'", "share of the experts", "use topology 'split'"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"autoscaling": {"max": 2}}},
            ["autoscaling", "'local'", "one process", "use topology 'split'"],
        ),
        (
            {
                "model": {"model_dir": "/m"},
                "gang": {"expert_shards": 1, "attention_workers": 3, "autoscaling": {"max": 2}},
            },
            ["attention_workers=3", "autoscaling.max=2", "leave it out"],
        ),
        (
            {
                "model": {"model_dir": "/m"},
                "gang": {"expert_shards": 1, "min_attention_workers": 2, "autoscaling": {"max": 2}},
            },
            ["min_attention_workers=2", "autoscaling.min=1", "lower it"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"expert_autoscaling": {"min": 3, "max": 2}}},
            ["gang.expert_autoscaling", "min=3", "max=2", "lower it"],
        ),
        (
            {
                "model": {"model_dir": "/m"},
                "gang": {"expert_autoscaling": {"max": 2, "wait_share_high": 0.3, "wait_share_low": 0.3}},
            },
            ["gang.expert_autoscaling", "wait_share_low=0.3", "wait_share_high=0.3", "for ever", "lower it"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"topology": "colocated", "expert_autoscaling": {"max": 2}}},
            ["expert_autoscaling", "'colocated'", "no expert shards of their own", "use topology 'split'"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"topology": "local", "expert_autoscaling": {"max": 2}}},
            ["expert_autoscaling", "'local'", "use topology 'split'"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"expert_shards": 3, "expert_autoscaling": {"max": 2}}},
            ["expert_shards=3", "expert_autoscaling.min=1 to max=2", "leave it out"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"virtual_shards": 4, "expert_autoscaling": {"max": 5}}},
            ["expert_autoscaling.max=5", "virtual_shards=4", "lower it"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"expert_shards": 2, "expert_copies": 1,
                                                    "expert_autoscaling": {"max": 2}}},
            ["expert_copies=1", "expert_autoscaling.min=1", "lower it"],
        ),
        (
            {"model": {"model_dir": "/m"}, "gang": {"pin_cores": True, "expert_autoscaling": {"max": 2}}},
            ["pin_cores", "expert_autoscaling", "leave one of them out"],
        ),
        ({"model": {"model_dir": "/m"}, "cache": {"max_seqs": 64, "max_step_tokens": 8}}, ["max_step_tokens=8"]),
    ],
)  # fmt: skip
def test_errors_name_field_value_and_remedy(overrides: dict[str, dict[str, object]], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(None, overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.toml", "model = [", "not valid TOML"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.json", "[1]", "expected a table"),
        ("a.ini", "", "name the file .toml"),
        ("a.toml", 'model = "x"', "expected a table"),
    ],
)
def test_bad_files(name: str, text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SettingsError, match=part):
        Settings.load(path, {"model": {"model_dir": "/m"}})


def test_the_demo_model_is_served_where_neither_flag_nor_file_says_what() -> None:
    assert Settings.load(None, {"http": {"port": 1}}).served_model_name == "divisi-demo"
    assert Settings.load(None, {"model": {"model_dir": "/m/other", "dtype": None}}).served_model_name == "other"


@pytest.mark.parametrize(
    ("given", "names"),
    [(None, ("m",)), ("a", ("a",)), ("a,b", ("a", "b")), ("a, b/c", ("a", "b/c")), (["a", "b"], ("a", "b"))],
)
def test_names_of_the_model(given: object, names: tuple[str, ...]) -> None:
    settings = Settings.from_args({"model": {"model_dir": "/m"}, "http": {"served_model_name": given}})
    assert settings.model_names == names
    assert settings.served_model_name == names[0]


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        (None, ()),
        ("https://a.example", ("https://a.example",)),
        ("http://localhost:3000,https://A.example", ("http://localhost:3000", "https://a.example")),
        (["*"], ("*",)),
    ],
)
def test_allowed_origins(given: object, origins: tuple[str, ...]) -> None:
    settings = Settings.from_args({"model": {"model_dir": "/m"}, "http": {"allowed_origins": given}})
    assert settings.http.allowed_origins == origins


@pytest.mark.parametrize("given", ["a.example", "https://a.example/", "https://a.example/chat", "ftp://a", ""])
def test_what_is_no_origin(given: str) -> None:
    with pytest.raises(SettingsError, match=r"http\.allowed_origins\.0: not an origin: write scheme"):
        Settings.from_args({"model": {"model_dir": "/m"}, "http": {"allowed_origins": given}})


def test_a_name_must_not_be_empty() -> None:
    with pytest.raises(SettingsError, match=r"http\.served_model_name\.1"):
        Settings.from_args({"model": {"model_dir": "/m"}, "http": {"served_model_name": "a,"}})


def test_a_file_has_to_name_the_model(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[http]\nport = 1\n")
    with pytest.raises(SettingsError, match=r"model\.model_dir: missing"):
        Settings.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        read_config_file(tmp_path / "none.toml")


def test_frozen() -> None:
    settings = Settings.load(None, {"model": {"model_dir": "/m"}})
    with pytest.raises(ValueError, match="frozen"):
        settings.cache.page_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("gang", "shape"),
    [
        ({}, GangShape(1, 0)),
        ({"expert_shards": 2}, GangShape(1, 2)),
        ({"topology": "split", "attention_workers": 3}, GangShape(3, 1)),
        ({"topology": "colocated", "attention_workers": 3}, GangShape(3, 3, colocated=True)),
        ({"topology": "colocated"}, GangShape(1, 1, colocated=True)),
        ({"expert_shards": 2, "autoscaling": {"max": 4}}, GangShape(4, 2)),
    ],
)
def test_the_shape_of_the_gang(gang: dict[str, object], shape: GangShape) -> None:
    settings = Settings.load(None, {"model": {"model_dir": "/m"}, "gang": gang})
    assert settings.gang.shape == shape
    assert Settings.from_args(settings.model_dump(mode="json")).gang.shape == shape


@pytest.mark.parametrize("example", sorted((Path(__file__).parents[3] / "deploy/examples").glob("*.yaml")), ids=str)
def test_the_examples_are_valid(example: Path) -> None:
    applications = read_config_file(example)["applications"]
    settings = Settings.from_args(applications[0]["args"])
    assert settings.gang.topology == example.stem.removeprefix("serve-")


@pytest.mark.parametrize(("limit", "replicas", "share"), [(1024, 1, 1024), (10, 3, 3), (4, 4, 1)])
def test_ingress_replicas_share_a_limit(limit: int, replicas: int, share: int) -> None:
    overrides = {"model": {"model_dir": "/m"}, "http": {"ingress_replicas": replicas}}
    settings = Settings.load(None, overrides | {"limits": {"max_queued_requests": limit}})
    assert settings.ingress_share(settings.max_queued_requests) == share


def test_what_is_let_in_follows_the_workers_that_are_there() -> None:
    gang = {"topology": "split", "attention_workers": 3}
    given = {"model": {"model_dir": "/m"}, "gang": gang, "cache": {"max_seqs": 8}}
    settings = Settings.load(None, given)
    assert [settings.queued_requests(workers) for workers in (1, 2, 3)] == [8, 16, 24]
    assert settings.max_queued_requests == 24
    settings = Settings.load(None, given | {"limits": {"max_queued_requests": 5}})
    assert settings.queued_requests(1) == settings.queued_requests(3) == 5


def test_a_colocated_gang_waits_for_all_and_a_split_one_for_a_worker() -> None:
    def least(**gang: Any) -> int:
        return Settings.load(None, {"model": {"model_dir": "/m"}, "gang": gang}).gang.least_workers

    assert least(topology="split", attention_workers=3) == 1
    assert least(topology="split", attention_workers=3, min_attention_workers=2) == 2
    assert least(topology="colocated", attention_workers=3) == 3
    for topology, workers in (("split", 1), ("colocated", 3)):
        with pytest.raises(SettingsError, match="min_attention_workers=2 doesn't go with"):
            least(topology=topology, attention_workers=workers, min_attention_workers=2)


def test_every_ingress_replica_gets_a_request() -> None:
    http, limits = {"ingress_replicas": 5}, {"max_queued_requests": 4}
    with pytest.raises(SettingsError, match=r"max_queued_requests=4 .*raise it to 5"):
        Settings.load(None, {"model": {"model_dir": "/m"}, "http": http, "limits": limits})


@pytest.mark.parametrize(
    ("variables", "temp_dir", "state"),
    [
        ({}, "/tmp", "/home/me/.local/state"),
        ({"TMPDIR": "/t", "XDG_STATE_HOME": "/s"}, "/t", "/s"),
        ({"TMPDIR": "/t", "RAY_TMPDIR": "/r", "XDG_STATE_HOME": "not/absolute"}, "/r", "/home/me/.local/state"),
        ({"RAY_ADDRESS": "", "XDG_STATE_HOME": ""}, "/tmp", "/home/me/.local/state"),
    ],
)
def test_surroundings(variables: dict[str, str], temp_dir: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "TMPDIR", "RAY_TMPDIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    found = Surroundings.read()
    assert (found.temp_dir, found.state_home, found.ray_address) == (Path(temp_dir), Path(state), None)
    assert (found.temp_dir_variable is None) == (temp_dir == "/tmp")


def test_tls_needs_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "divisi.toml"
    path.write_text('[model]\nmodel_dir = "/m"\n[gang.tls]\ncertificate = "/c.pem"\nkey = "/k.pem"\nca = "/ca.pem"\n')
    assert Settings.load(path, {"gang": {"expert_shards": 1}}).gang.tls is not None
    path.write_text(path.read_text().replace('key = "/k.pem"', ""))
    with pytest.raises(SettingsError, match=r"gang\.tls\.key: "):
        Settings.load(path)


@pytest.mark.parametrize(
    ("gang", "begins", "most_ranks"),
    [
        ({"expert_autoscaling": {"max": 4}}, 1, 5),
        ({"expert_autoscaling": {"min": 2, "max": 4}}, 2, 5),
        ({"expert_autoscaling": {"min": 2, "max": 4}, "expert_shards": 3, "attention_workers": 2}, 3, 6),
        ({"expert_autoscaling": {"min": 1, "max": 4}, "rebalance": True}, 1, 5),  # it has several at times
        ({"expert_shards": 3}, 3, 4),
    ],
)
def test_a_gang_begins_with_the_least_shards_of_the_policy(
    gang: dict[str, object], begins: int, most_ranks: int
) -> None:
    found = Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang}).gang
    assert (found.topology, found.expert_shards, found.most_ranks) == ("split", begins, most_ranks)


def test_the_policy_of_shards_is_told_to_the_gang() -> None:
    scaling = {"max": 4, "wait_share_high": 0.6, "downscale_delay_s": 60}
    gang = Settings.from_args({"model": {"model_dir": "/m"}, "gang": {"expert_autoscaling": scaling}}).gang
    assert gang.wait_rule == WaitRule(1, 4, high=0.6, low=0.25, upscale_delay_s=30, downscale_delay_s=60)
    assert Settings.from_args({"model": {"model_dir": "/m"}}).gang.wait_rule is None
