"""``--dtype``, ``--offload`` and ``--quantize``: how weights are held, checked, and planned with ``--plan``."""

from collections.abc import Sequence
from typing import Any

import typer

from flux2pixel.cli.stage import Job
from flux2pixel.runtime.errors import UsageError

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CHOICES = {"dtype": tuple(DTYPES), "offload": ("model", "group", "sequential"), "quantize": ("int8", "fp8")}


def held(job: Job, dtype: str | None, offload: str | None, quantize: str | None, plan: bool = False) -> dict[str, Any]:
    """The three flags as arguments of `open_model` and `evaluate`.

    Raises UsageError for an unknown word and for what the device or the others make no sense of; a ``plan`` may be of
    another machine's device.
    """
    given = {"dtype": dtype, "offload": offload, "quantize": quantize}
    for name, value in given.items():
        if value is not None and value not in CHOICES[name]:
            raise UsageError(f"--{name} {value}: give one of {', '.join(CHOICES[name])}")
    if not any(given.values()):
        return {}
    import torch

    from flux2pixel.models.offload import check
    from flux2pixel.runtime import device

    check(offload, quantize, torch.device("meta") if plan else device.choose(job.recipe.device))  # type: ignore[arg-type]
    return {name: value for name, value in given.items() if value} | (
        {"dtype": getattr(torch, DTYPES[dtype])} if dtype else {}
    )


def print_plan(
    job: Job, title: str, models: Sequence[str], weights: dict[str, Any], processes: int = 1, **work: Any
) -> None:
    """Print the plan of drawing with ``models``; ``weights`` are those of `held`, ``work`` is `plan_models`'s."""
    import torch

    from flux2pixel.models.plan import lines, plan_models, planned_base
    from flux2pixel.runtime import device

    place = device.choose(job.recipe.device)
    bases = [planned_base(name, device=place, **weights) for name in models]
    short = {getattr(torch, name): word for word, name in DTYPES.items()}
    words = [f"--{name} {short.get(value, value)}" for name, value in weights.items()]
    title = " ".join([f"{title} with {' and '.join(models)}", *words])
    typer.echo("\n".join(lines(title, plan_models(bases, job.recipe.sample, **work), processes)))
