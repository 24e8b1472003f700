"""The OpenAI-compatible HTTP API. Knows the gang only as an `EngineClient`; imports neither Ray nor torch."""

from divisi.cluster.telemetry.rows import StatRow
from divisi.deploy.api.app import build_app
from divisi.deploy.api.engine_client import EngineClient, GangStatus
from divisi.deploy.api.settings import ApiSettings

__all__ = ["ApiSettings", "EngineClient", "GangStatus", "StatRow", "build_app"]
