"""What a user can get wrong about a model directory.

DivisiError                 root of everything that Divisi raises on purpose; cluster/errors.py adds to it
+-- ConfigError             config.json: a field is missing, malformed, contradictory or not supported
+-- CheckpointError         the weights: missing, of another shape, damaged, or in a format that is not read
"""

from __future__ import annotations


class DivisiError(Exception):
    """Root of the error tree."""


class ConfigError(DivisiError, ValueError):
    """A field of config.json that cannot be used; the text names field, value and remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"config.json: {field} = {value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        """Pickle by the constructor's arguments, so that the error crosses processes."""
        return type(self), (self.field, self.value, self.remedy)


class CheckpointError(DivisiError, ValueError):
    """The weights cannot be used; the text names tensor or file, what was expected and what was found."""
