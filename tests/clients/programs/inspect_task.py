"""An inspect-ai task file: eight questions over two turns' worth of content kinds, scored by inclusion."""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message


@task
def small_talk() -> Task:
    """Answers are noise on a random model; what counts is that each sample is asked, answered and scored."""
    samples = [Sample(input=f"What is {number} plus one?", target=str(number + 1)) for number in range(8)]
    return Task(dataset=samples, solver=[system_message("Answer with a number."), generate()], scorer=includes())
