"""All settings of a deployment, as frozen models; the only module that reads the environment.

A setting comes from a command-line flag, else from the configuration file, else from its default.
The file (TOML, YAML or JSON) has the shape of `Settings`: one table per group.

    [model]
    model_dir = "/models/Qwen3-Next-80B-A3B-Instruct"
    [gang]
    topology = "split"
    expert_shards = 4
    [cache]
    kv_memory = "16GiB"
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from divisi.deploy.routing import TOKENS_PER_REQUEST
from divisi.deploy.settings.gang import GangSettings
from divisi.deploy.settings.groups import (
    AuthSettings,
    CacheSettings,
    Group,
    HttpSettings,
    LimitSettings,
    LogSettings,
    ModelSettings,
    MtpSettings,
    PlacementSettings,
    TelemetrySettings,
)
from divisi.model.demo import checkpoint_dir

CONFIG_VARIABLE = "DIVISI_CONFIG"
"""Names the configuration file where none is given on the command line (a container image's entry point)."""


class SettingsError(ValueError):
    """A setting is unknown, malformed or contradicts another; the text names field, value and remedy."""


class Settings(Group):
    """One deployment."""

    model: ModelSettings
    gang: GangSettings = GangSettings()
    placement: PlacementSettings = PlacementSettings()
    cache: CacheSettings = CacheSettings()
    mtp: MtpSettings = MtpSettings()
    http: HttpSettings = HttpSettings()
    limits: LimitSettings = LimitSettings()
    auth: AuthSettings = AuthSettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def max_queued_requests(self) -> int:
        """The limit as given, or what the gang can run with all its attention workers."""
        return self.queued_requests(self.gang.attention_workers)

    def queued_requests(self, workers: int) -> int:
        """The limit as given, or what a gang of so many attention workers can run."""
        if self.limits.max_queued_requests is not None:
            return self.limits.max_queued_requests
        return max(self.cache.max_seqs * workers, self.http.ingress_replicas)

    @property
    def queued_tokens_per_worker(self) -> int:
        """The mark as given, or three quarters of what the answers count that a worker runs at once."""
        given = None if self.gang.autoscaling is None else self.gang.autoscaling.queued_tokens_per_worker
        return given or 3 * TOKENS_PER_REQUEST * self.cache.max_seqs // 4

    @property
    def max_queued_tokens(self) -> int:
        """The limit as given, or 32 full steps' tokens; the prefill budget is one for the whole gang."""
        return self.limits.max_queued_tokens or 32 * self.cache.max_step_tokens

    @property
    def served_model_name(self) -> str:
        """The model's name in the API."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All its names, the one in replies first."""
        return self.http.served_model_name or (self.model.model_dir.resolve().name,)

    def ingress_share(self, limit: int) -> int:
        """One ingress replica's part of a limit on the whole service; all parts together never exceed it."""
        return limit // self.http.ingress_replicas

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        queued, replicas = self.max_queued_requests, self.http.ingress_replicas
        if queued < replicas:
            raise ValueError(
                f"limits.max_queued_requests={queued} leaves some of http.ingress_replicas={replicas} without any; "
                f"raise it to {replicas} or more, or use fewer replicas"
            )
        return self

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> Settings:
        """Settings of the `args` mapping of a Serve application. Raises SettingsError."""
        try:
            return cls.model_validate(dict(args))
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(problem) for problem in error.errors())) from None

    @classmethod
    def load(cls, file: Path | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
        """Settings of a file under overrides given as {group: {field: value}}; overrides of None count as not given.

        Without a file, the one that DIVISI_CONFIG names is read; without that one either, the model is the demo model
        where the overrides name none. Raises SettingsError.
        """
        if file is None and (named := os.environ.get(CONFIG_VARIABLE)):
            file = Path(named)
        merged = read_config_file(file) if file is not None else {"model": {"model_dir": checkpoint_dir()}}
        for group, fields in (overrides or {}).items():
            given = {name: value for name, value in fields.items() if value is not None}
            if given:
                merged[group] = {**_table(merged.get(group, {}), group), **given}
        merged.setdefault("model", {})
        return cls.from_args(merged)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the environment says beside the settings: where other programs' files and servers are."""

    ray_address: str | None
    """RAY_ADDRESS, where it is set and not empty."""
    temp_dir: Path
    """Where Ray puts its folder `ray`, unless told otherwise."""
    temp_dir_variable: str | None
    """The variable that says so: RAY_TMPDIR or TMPDIR."""
    state_home: Path
    """Of the user's files that outlive a program, by the XDG Base Directory Specification."""

    @classmethod
    def read(cls) -> Surroundings:
        """The environment as it is now."""
        variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        return cls(
            ray_address=os.environ.get("RAY_ADDRESS") or None,
            temp_dir=Path(os.environ[variable] if variable else "/tmp"),
            temp_dir_variable=variable,
            state_home=state if state.is_absolute() else Path(os.path.expanduser("~/.local/state")),
        )


def set_environment(variables: Mapping[str, str]) -> None:
    """Set variables for the processes that this one starts from now on, or that a library starts in it."""
    os.environ.update(variables)


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment with some variables set, for a child process."""
    return {**os.environ, **extra}


def read_config_file(path: Path) -> dict[str, Any]:
    """Parse a TOML, YAML or JSON file by its suffix into a plain mapping. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of some systems put a byte order mark first
        match path.suffix:
            case ".toml":
                data: object = tomllib.loads(text)
            case ".yaml" | ".yml":
                data = yaml.safe_load(text) or {}
            case ".json":
                data = json.loads(text)
            case other:
                raise SettingsError(f"{path}: unknown kind {other!r}; name the file .toml, .yaml or .json")
    except OSError as error:
        raise SettingsError(f"{path}: cannot read the configuration file: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from None
    return _table(data, str(path))


def _table(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise SettingsError(f"{where}: expected a table of settings, found {data!r}")
    return dict(data)


def _explain(problem: Any) -> str:
    """One line for one pydantic error: field, value, remedy."""
    path = [str(part) for part in problem["loc"]]
    field = ".".join(path) or "settings"
    if problem["type"] == "extra_forbidden":
        known = _known_fields(path[:-1])
        near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{field}: unknown setting; {hint}"
    if problem["type"] == "missing":
        return f"{field}: missing; give it on the command line or in the configuration file"
    if problem["type"] == "model_type":
        return f"{field}: expected a table of settings (got {problem['input']!r})"
    message = str(problem["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], Mapping) else f" (got {problem['input']!r})"
    return f"{field}: {message}{shown}"


def _known_fields(path: list[str]) -> list[str]:
    group: type[BaseModel] = Settings
    for name in path:
        annotation = group.model_fields[name].annotation
        groups = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        found = next((one for one in groups if issubclass(one, BaseModel)), None)
        if found is None:
            return []
        group = found
    return list(group.model_fields)
