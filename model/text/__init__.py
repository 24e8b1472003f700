"""Text: tokenizer, chat template, incremental detokenisation and stop strings. Free of torch and transformers."""

from divisi.model.text.codec import SamplingDefaults, TextCodec
from divisi.model.text.detokenize import Detokenizer
from divisi.model.text.errors import TemplateError, TextError, TokenizerError
from divisi.model.text.stop import StopMatcher
from divisi.model.text.template import ChatTemplate
from divisi.model.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "SamplingDefaults",
    "StopMatcher",
    "TemplateError",
    "TextCodec",
    "TextError",
    "Tokenizer",
    "TokenizerError",
]
