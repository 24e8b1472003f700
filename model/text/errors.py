"""Errors of the text side; they are what a user got wrong, so each is also a ValueError.

DivisiError
+-- TextError
    +-- TokenizerError    the model directory's tokenizer files, or text or ids that it cannot take
    +-- TemplateError     the chat template, or a conversation that it refuses
"""

from __future__ import annotations

from divisi.model.errors import DivisiError


class TextError(DivisiError, ValueError):
    """Text, token ids or text files that cannot be used; says what and why."""


class TokenizerError(TextError):
    """A tokenizer file is missing or of an unsupported kind, or an input cannot be tokenised."""


class TemplateError(TextError):
    """The chat template is missing or broken, or refuses the conversation."""
