"""``doctor`` and ``bases``: what this machine is, whether a recipe can run on it, and what can be converted."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.cli.options import Flags
from flux2pixel.cli.stage import resolve
from flux2pixel.families.known import KNOWN, Known
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.memory import available_memory

GIB = 2**30
REQUIRED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "scipy", "pillow", "typer")
BF16_CAPABILITY = (8, 0)  # of NVIDIA GPUs; older ones compute bfloat16 slowly or not at all
LARGE = 10**9  # parameters from which a training wants a GPU


def doctor_command(
    flags: Flags,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Processes that the training is planned for.")] = 1,
) -> None:
    """Print versions, devices, memory and disk, and what of the recipe can run here; exit 1 if it cannot."""
    job = resolve(flags)
    report, problems = doctor(job.recipe, job.run, gpus, offline=flags.offline)
    typer.echo(report)
    if problems:
        raise Flux2PixelError(f"the recipe cannot run here: {'; '.join(problems)}")


def doctor(recipe: Recipe, run: Path, gpus: int = 1, *, offline: bool = False) -> tuple[str, list[str]]:
    """Return a printable account of this machine, and the reasons, if any, why ``recipe`` cannot run on it.

    Memory and disk are held against the plan of the recipe's training, made of fake tensors: no weight is loaded.
    ``offline`` asks nothing of the Hub.
    """
    cards, host, problems = _devices(), available_memory(), list[str]()
    lines = ["versions", f"  python  {platform.python_version()} ({platform.system()} {platform.machine()})"]
    for name in (*REQUIRED, *optional_packages(recipe)):
        found, what = version(name), "" if name in REQUIRED else f" (for {optional_packages(recipe)[name]})"
        lines.append(f"  {name}  {found or 'missing'}{what}")
        if found is None:
            problems.append(f"{name} is not installed{what} (pip install {name})")
    lines += ["machine", f"  CPUs  {_cpus()}", f"  memory  {host / GIB:.1f} GiB may be taken"]
    lines += [f"  {card}" for card in cards] or ["  GPU  none; the CPU is used"]
    if recipe.threads > _cpus():
        lines.append(f"  note: the recipe asks for {recipe.threads} threads on {_cpus()} CPUs; --set threads=0")
    folder = next((path for path in (run, *run.absolute().parents) if path.exists()), run)
    problems += _files(recipe, run, folder)
    known = next((known for alias, known in KNOWN.items() if recipe.base in (alias, known.hub)), None)
    problems += _hub(known, offline) if known else []
    lines += ["recipe", f"  base  {recipe.base}", f"  run  {run}"]
    if version("torch") and importlib.util.find_spec("torch"):
        told, found_wrong = _plan(recipe, run, gpus, cards, host, folder)
        lines, problems = lines + told, problems + found_wrong
    lines += [f"  problem: {problem}" for problem in problems] or ["  can run here"]
    return "\n".join(lines), problems


def version(package: str) -> str | None:
    """Return the installed version of ``package``, or ``None``; the package is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def optional_packages(recipe: Recipe) -> dict[str, str]:
    """The packages beyond the base install that the recipe needs, each with what for."""
    needed = {"torchao": "finetune.optimizer = adamw-8bit"} if recipe.finetune.optimizer == "adamw-8bit" else {}
    if recipe.finetune.frozen_int8:
        needed["torchao"] = "finetune.frozen_int8"
    if recipe.finetune.perceptual:
        needed["lpips"] = "finetune.perceptual"
    needed |= {name: "finetune.trackers" for name in recipe.finetune.trackers if name != "jsonl"}
    for key, source in (("fit_subspace", recipe.fit_subspace.source), ("data", recipe.data.source)):
        if source.startswith("hf:"):
            needed["datasets"] = f"{key}.source"
        elif source.endswith(".tar") or "://" in source:
            needed["webdataset"] = f"{key}.source"
    if "geneval" in recipe.eval.suite and recipe.base in KNOWN:
        needed["opencv-python-headless"] = "eval.suite = geneval"
    if "fidelity" in recipe.eval.suite and recipe.eval.reference:
        needed["torch-fidelity"] = "eval.suite = fidelity"
    return needed


class Card:
    """A GPU: its name, memory in bytes and, of NVIDIA's, compute capability."""

    def __init__(self, place: str, name: str, memory: int, capability: tuple[int, int] | None):
        self.place, self.name, self.memory, self.capability = place, name, memory, capability

    def __str__(self) -> str:
        kind = f", compute capability {'.'.join(map(str, self.capability))}" if self.capability else ""
        return f"{self.place}  {self.name}, {self.memory / GIB:.1f} GiB{kind}"


def _devices() -> list[Card]:
    try:
        import torch
    except ImportError:
        return []
    cards = []
    about: Any
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        cards.append(Card(f"cuda:{index}", about.name, about.total_memory, (about.major, about.minor)))
    if not cards and torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            about = torch.xpu.get_device_properties(index)
            cards.append(Card(f"xpu:{index}", about.name, about.total_memory, None))
    if not cards and torch.backends.mps.is_available():
        cards.append(Card("mps", "Apple GPU", int(torch.mps.recommended_max_memory()), None))
    return cards


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files(recipe: Recipe, run: Path, folder: Path) -> list[str]:
    """What is wrong with the images that the recipe names, and with the run directory; ``folder`` is there already."""
    from flux2pixel.data.sources import own_source

    problems = []
    for key, source in (("fit_subspace", recipe.fit_subspace.source), ("data", recipe.data.source)):
        elsewhere = source.startswith("hf:") or "://" in source or source == "photographs" or own_source(source)
        if not source:
            problems.append(f"{key}.source: no images named; give --set {key}.source=FOLDER")
        elif not elsewhere and not Path(source.partition("{")[0] or source).exists():
            problems.append(f"{key}.source: no such images: {source}")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        problems.append(f"{run}: cannot be written; choose another --run")
    return problems


def _hub(known: Known, offline: bool) -> list[str]:
    """Whether a published base can be had: it is cached, or the Hub gives it to this user."""
    from huggingface_hub import auth_check, get_token, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(known.hub, "transformer/config.json"), str):
        return []
    if known.gated and not get_token():
        return [f"{known.hub} is gated and there is no Hub token (accept its licence there, then hf auth login)"]
    if offline:
        return [f"{known.hub} is not in the cache, and --offline"]
    try:
        auth_check(known.hub)
    except (GatedRepoError, RepositoryNotFoundError):
        return [f"{known.hub} is gated and the token has no access (accept its licence on its page)"]
    except (HfHubHTTPError, OSError, ValueError) as error:
        return [f"{known.hub} is not in the cache and the Hub cannot be reached ({type(error).__name__})"]
    return []


def _plan(
    recipe: Recipe, run: Path, gpus: int, cards: Sequence[Card], host: int, folder: Path
) -> tuple[list[str], list[str]]:
    """Lines and problems of the training's plan against this machine's devices, memory and disk."""
    from flux2pixel.finetune.plan.plan import plan

    try:
        planned = plan(recipe, run, gpus)
    except UsageError as error:
        return [], [str(error)]
    peak = planned.memory.peak(recipe.finetune.checkpointing)
    weights = planned.parameters.total * (2 if recipe.finetune.trainable == "lora" else 4)
    disk, free = sum(planned.disk.values()), shutil.disk_usage(folder).free
    lines = [f"  training  {peak / GIB:.1f} GiB of a device, {planned.world} process(es), {disk / GIB:.1f} GiB of disk"]
    lines.append(f"  free disk  {free / GIB:.1f} GiB at {folder}")
    problems = []
    on_cpu = not cards or recipe.device == "cpu"
    if on_cpu and planned.parameters.total > LARGE:
        problems.append(f"no GPU: the training takes {peak / GIB:.1f} GiB of one and is out of reach of a CPU")
    elif on_cpu and peak > host:
        problems.append(f"the training takes {peak / GIB:.1f} GiB of memory, and there are {host / GIB:.1f}")
    if not on_cpu:
        problems += _on_cards(recipe, planned, peak, cards)
        if 1.2 * weights * min(planned.world, len(cards)) > host:  # each process reads its copy through the host's
            problems.append(f"loading takes {1.2 * weights / GIB:.1f} GiB of memory, and there are {host / GIB:.1f}")
    if disk > free:
        problems.append(
            f"{folder}: {free / GIB:.1f} GiB are free, the run takes {disk / GIB:.1f}; choose another --run"
        )
    return lines, problems


def _on_cards(recipe: Recipe, planned: Any, peak: int, cards: Sequence[Card]) -> list[str]:
    """What the GPUs of this machine cannot do of the plan."""
    problems = []
    smallest = min(cards, key=lambda card: card.memory)
    if peak + GIB > smallest.memory:  # beside it are the context and what the allocator cannot use
        problems.append(
            f"the training takes {peak / GIB:.1f} GiB and a context of a GPU, {smallest.place} has "
            f"{smallest.memory / GIB:.1f}"
        )
    if planned.world > len(cards):
        problems.append(f"the recipe is for {planned.world} processes, one a GPU, and this machine has {len(cards)}")
    old = smallest.capability and smallest.capability < BF16_CAPABILITY
    if recipe.finetune.precision == "bf16" and old:
        problems.append(f"{smallest} has no bf16; --set finetune.precision=fp32")
    return problems
