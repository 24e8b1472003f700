"""What changes in a running application, and why everything else does not. No Ray.

Serve restarts every replica of an application whose `args` differ, its gang with it. What needs no restart is given as
`user_config` of the deployments instead, in the shape of `Settings`; Serve hands it to the replicas as they run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from divisi.deploy.settings import Settings, SettingsError

LIVE = {
    "log": ("level",),
    "limits": ("max_queued_requests", "max_queued_tokens", "request_timeout_s", "retry_after_s"),
    "gang": ("min_attention_workers",),
}
"""By group, what may be in a `user_config`. Every deployment may be given all of it, and takes what is its own."""

_LIVE_REMEDY = "Give it as user_config of the deployments instead"
_REMEDY = "End the application first, which lets open answers end, or deploy another one beside it"


def with_live(settings: Settings, user_config: Mapping[str, Any] | None) -> Settings:
    """The settings with what a `user_config` changes. Raises SettingsError."""
    changed: dict[str, Any] = settings.model_dump()
    for group, fields in (user_config or {}).items():
        if not isinstance(fields, Mapping):
            raise SettingsError(f"user_config: {group}: expected a table of settings, got {fields!r}")
        for name in fields:
            if name not in LIVE.get(group, ()):
                known = ", ".join(f"{group}.{name}" for group, names in LIVE.items() for name in names)
                raise SettingsError(
                    f"user_config: {group}.{name} cannot change while the server runs, only {known} can; give it in "
                    "args"
                )
        changed[group] |= fields
    found = Settings.from_args(changed)
    least = settings.gang.least_workers
    if found.gang.least_workers < least:
        raise SettingsError(
            f"user_config: gang.min_attention_workers={found.gang.least_workers} is below the {least} of args, for "
            "which the workers have buffers; give that many or more"
        )
    return found


def refusal(running: str | None, wanted: Settings) -> str:
    """Why an application is not to take the place of one that serves; `running` is what that one was `told`.

    Empty where nothing stands against it: nobody serves (None), or was told the same.
    """
    if running is None:
        return ""
    differing = [*_differences(json.loads(running), json.loads(told(wanted)))]
    if not differing:
        return ""
    live = {f"{group}.{name}" for group, names in LIVE.items() for name in names}
    changes = "; ".join(f"{name} is {old} and cannot become {new}" for name, old, new in differing)
    remedy = _LIVE_REMEDY if {name for name, *_ in differing} <= live else _REMEDY
    return f"{changes} while the gang serves: all of it would be restarted, and open answers would break. {remedy}"


def told(settings: Settings) -> str:
    """What an application was told, to be kept for `refusal`."""
    return json.dumps(settings.model_dump(mode="json"), sort_keys=True)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*old, *new}):
        one, other = old.get(name), new.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{path}{name}.")
        elif one != other:
            yield f"{path}{name}", one, other
