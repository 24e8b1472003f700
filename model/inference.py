"""Torch without gradients: entering its mode takes a small model's layer's time, so that it is entered once a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
ResultT = TypeVar("ResultT")


def in_inference_mode(function: Callable[Parameters, ResultT]) -> Callable[Parameters, ResultT]:
    """As `torch.inference_mode`, which a caller that is in it already does not pay for again."""

    @wraps(function)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> ResultT:
        if torch.is_inference_mode_enabled():
            return function(*arguments, **options)
        with torch.inference_mode():
            return function(*arguments, **options)

    return run
