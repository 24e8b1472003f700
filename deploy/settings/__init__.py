"""All settings of a deployment, as frozen models. Reads the environment, and is the only one that does."""

from divisi.deploy.settings.settings import (
    CONFIG_VARIABLE,
    Settings,
    SettingsError,
    Surroundings,
    child_environment,
    read_config_file,
    set_environment,
)

__all__ = [
    "CONFIG_VARIABLE",
    "Settings",
    "SettingsError",
    "Surroundings",
    "child_environment",
    "read_config_file",
    "set_environment",
]
