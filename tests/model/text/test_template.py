from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from divisi.model.text import ChatTemplate, SamplingDefaults, TemplateError, TextCodec, TextError, TokenizerError

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "a <b> & 'c'"}, {"role": "user", "content": ""}],
    [{"role": "user", "content": "{{ 7 * 7 }} {% raw %}"}, {"role": "assistant", "content": "你好 👩‍🚀\n"}],
]
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'] }}]\n  {% endif %}\n{% endfor %}\n",
    "{%- for m in messages -%}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{%- endfor -%}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ bos_token | default('none') }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ dict(a=1) | tojson(indent=2) }}",
    "{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}{{ '!' if add_generation_prompt }}{{ flag }}",
    "{{ messages[0].content.split('i') }}{{ messages[-1]['content'] | trim | upper }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_as_transformers(source: str, messages: list[dict[str, Any]]) -> None:
    ours = ChatTemplate(source).render(messages, flag=True)
    theirs: Any = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, flag=True)
    assert ours == theirs[0][0]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_model_dirs_template(model_dir: Path, messages: list[dict[str, Any]]) -> None:
    source = json.loads((model_dir / "tokenizer_config.json").read_text())["chat_template"]
    theirs: Any = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    assert TextCodec.load(model_dir).chat_template().render(messages) == theirs[0][0]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRIMMING = CHATML.replace("m.content", "m.content | trim")


@pytest.mark.parametrize("source", [CHATML, TRIMMING])
@pytest.mark.parametrize("last", ["Once upon", "end", "d", "|", "m", "Answer: ", "  indented", "a\n\n", "user\nHi"])
def test_continued_as_transformers(source: str, last: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": last}]
    theirs: Any = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    assert ChatTemplate(source).render_continued(messages) == theirs[0][0]


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ messages | length }}"])
def test_a_last_message_that_is_not_shown_cannot_be_continued(source: str) -> None:
    with pytest.raises(TemplateError, match="cannot be continued"):
        ChatTemplate(source).render_continued([*CONVERSATIONS[0], {"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.missing.deeper }}", "no attribute"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages + 1 }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurs"),
        ("{% for i in range(90000) %}{{ 'x' * 10000 }}{% endfor %}", "more than"),
        ("{% for i in range(10000000) %}{% endfor %}", "ange"),
    ],
)
def test_refusals(source: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        ChatTemplate(source).render(CONVERSATIONS[0], max_chars=10**7)


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 ", "{% nothing %}", "x" * (2**20 + 1)])
def test_broken_sources(source: str) -> None:
    with pytest.raises(TemplateError, match="chat template"):
        ChatTemplate(source)


def _copy(model_dir: Path, out: Path, **files: object) -> Path:
    (out / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (out / name.replace("__", ".")).write_text(text)
    return out


def test_codec_of_a_bare_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    codec = TextCodec.load(_copy(model_dir, tmp_path))
    assert codec.eos_ids == frozenset()
    assert codec.sampling == SamplingDefaults()
    with pytest.raises(TemplateError, match="no chat template"):
        codec.chat_template()


def test_codec_reads_every_file(model_dir: Path, tmp_path: Path) -> None:
    codec = TextCodec.load(
        _copy(
            model_dir,
            tmp_path,
            tokenizer_config__json={"eos_token": {"content": "<|im_end|>"}, "chat_template": "field"},
            generation_config__json={"eos_token_id": [3, 5], "temperature": 0.7, "top_k": 20, "top_p": None},
            config__json={"eos_token_id": 9},
            chat_template__jinja="{{ eos_token }} {{ messages[0].content }}",
        )
    )
    assert codec.eos_ids == {3, 5, codec.tokenizer.id_of("<|im_end|>")}
    assert codec.sampling == SamplingDefaults(0.7, 1.0, 20)
    assert codec.chat_template().render(CONVERSATIONS[0]) == "<|im_end|> hi"


def test_codec_named_templates_and_config_eos(model_dir: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    files = {"tokenizer_config__json": {"chat_template": named}, "config__json": {"eos_token_id": 9}}
    codec = TextCodec.load(_copy(model_dir, tmp_path, **files))
    assert codec.chat_template().render(CONVERSATIONS[0]) == "d"
    assert codec.eos_ids == {9}


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("generation_config__json", "{", TextError, "not valid JSON"),
        ("generation_config__json", [1], TextError, "JSON object"),
        ("generation_config__json", {"eos_token_id": "x"}, TokenizerError, "eos_token_id"),
        ("generation_config__json", {"temperature": "hot"}, TextError, "temperature"),
        ("tokenizer_config__json", {"chat_template": 5}, TemplateError, "chat_template"),
    ],
)
def test_codec_errors(
    model_dir: Path, tmp_path: Path, file: str, content: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        TextCodec.load(_copy(model_dir, tmp_path, **{file: content}))


def test_byte_order_marks_are_no_text(model_dir: Path, tmp_path: Path) -> None:
    files = {
        "tokenizer_config__json": {"eos_token": "<|im_end|>"},
        "generation_config__json": {"temperature": 0.5},
        "chat_template__jinja": "{{ messages[0].content }}",
    }
    folder = _copy(model_dir, tmp_path, **files)
    for path in folder.iterdir():
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    codec = TextCodec.load(folder)
    assert codec.eos_ids == {codec.tokenizer.id_of("<|im_end|>")}
    assert codec.sampling.temperature == 0.5
    assert codec.chat_template().render(CONVERSATIONS[0]) == "hi"


def test_a_template_file_in_another_encoding_is_named(model_dir: Path, tmp_path: Path) -> None:
    folder = _copy(model_dir, tmp_path)
    (folder / "chat_template.jinja").write_text("é", encoding="latin-1")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja is not UTF-8"):
        TextCodec.load(folder)
