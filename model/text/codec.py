"""Everything textual that a model directory says: tokenizer, template, end-of-answer ids, sampling defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divisi.model.text.errors import TemplateError, TextError, TokenizerError
from divisi.model.text.template import ChatTemplate
from divisi.model.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What `generation_config.json` recommends for requests that don't say."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class TextCodec:
    """The text side of one model."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: the model has no chat template and serves completions only."""
    eos_ids: frozenset[int]
    """Ids that end an answer."""
    sampling: SamplingDefaults = SamplingDefaults()

    @classmethod
    def load(cls, model_dir: Path | str) -> TextCodec:
        """Read `tokenizer.json` and, where present, `tokenizer_config.json`, `generation_config.json`,
        `config.json`, `chat_template.jinja` and `chat_template.json`. Raises TextError naming the file and field.
        """
        folder = Path(model_dir)
        tokenizer = Tokenizer.load(folder)
        tokenizer_config = _read_json(folder / "tokenizer_config.json")
        generation_config = _read_json(folder / "generation_config.json")
        special = _special_tokens(tokenizer_config)
        source = _template_source(folder, tokenizer_config)
        return cls(
            tokenizer=tokenizer,
            template=None if source is None else ChatTemplate(source, variables=special),
            eos_ids=_eos_ids(folder, tokenizer, special, generation_config),
            sampling=_sampling_defaults(generation_config),
        )

    def chat_template(self) -> ChatTemplate:
        """The template, or TemplateError for a model without one."""
        if self.template is None:
            raise TemplateError("this model has no chat template; use /v1/completions")
        return self.template


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())  # bytes: json sees to byte order marks
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TextError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TextError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, by content; files spell them as text or as an added-token object."""
    tokens: dict[str, str] = {}
    for name, value in tokenizer_config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _template_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The file wins over the field, as in transformers; of several named templates, `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")  # a byte order mark would begin every prompt
        except OSError as error:
            raise TemplateError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise TemplateError(f"{path} is not UTF-8: {error}; save it in that encoding") from error
    source = _read_json(folder / "chat_template.json").get("chat_template", tokenizer_config.get("chat_template"))
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise TemplateError(f"chat_template must be a string, found {type(source).__name__}")
    return source


def _eos_ids(
    folder: Path, tokenizer: Tokenizer, special: dict[str, str], generation_config: dict[str, Any]
) -> frozenset[int]:
    """Ids of `generation_config.json` and the tokenizer's own; `config.json` only where both are silent."""
    ids = _id_set(generation_config.get("eos_token_id"), "generation_config.json: eos_token_id")
    if "eos_token" in special and (found := tokenizer.id_of(special["eos_token"])) is not None:
        ids |= {found}
    return ids or _id_set(_read_json(folder / "config.json").get("eos_token_id"), "config.json: eos_token_id")


def _id_set(value: Any, where: str) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise TokenizerError(f"{where} must be a token id or a list of them, found {value!r}")
    return frozenset(ids)


def _sampling_defaults(generation_config: dict[str, Any]) -> SamplingDefaults:
    """Fields that are absent or null keep the neutral value."""
    neutral = SamplingDefaults()
    chosen = {name: generation_config.get(name) for name in ("temperature", "top_p", "top_k")}
    for name, value in chosen.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            raise TextError(f"generation_config.json: {name} must be a number of 0 or more, found {value!r}")
    temperature, top_p, top_k = chosen["temperature"], chosen["top_p"], chosen["top_k"]
    return SamplingDefaults(
        temperature=neutral.temperature if temperature is None else float(temperature),
        top_p=neutral.top_p if top_p is None else float(top_p),
        top_k=neutral.top_k if top_k is None else int(top_k),
    )
