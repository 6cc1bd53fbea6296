"""The recipe: every setting of a run, typed, with its meaning, unit and bounds in one place.

A recipe is TOML; a user writes only what differs. What is left out is the base's own default (a base folder may carry
a ``flux2pixel.toml``), else the generic one below, which suits a published base; what is misspelt is refused with a
suggestion. ``[sample]`` has no defaults here: what is not written is the model's own.

``extends = "other.toml"`` on a recipe's first line takes another recipe, named relative to it, and changes some lines.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.settings import layered, merge, option, options, parse_assignment, plain, toml

FORMAT = 2
"""Of a whole recipe as ``dumps`` writes it. Whole recipes without it, of format 1, measured ``shift`` otherwise."""


@dataclass(frozen=True)
class FitSubspace:
    """``[fit_subspace]``: the low-rank basis that ties pixels to the base's latents."""

    source: str = option(
        "", "a folder | MANIFEST.jsonl | SHARDS.tar | hf:NAME | photographs (scikit-learn's) | a cache | the base's own"
    )
    images: int = option(1000, "images to fit on, the source's first; 0 = all", low=0)
    resolution: int = option(1024, "images are scaled to about this squared, aspect ratio kept; 0 = own size", low=0)
    max_broken: int = option(100, "unreadable images that are skipped; one more fails the run", low=0)
    method: str = option(
        "procrustes",
        "procrustes | pca | vae-jacobian | random",
        choices=("procrustes", "pca", "vae-jacobian", "random"),
    )
    rank: int = option(0, "columns of the basis; 0 = width of a latent token", low=0)
    center: bool = option(False, "pca: about the mean of the tokens")
    jacobian: str = option(
        "smoothed",
        "vae-jacobian: smoothed over the VAE's prior | exact | stochastic",
        choices=("smoothed", "exact", "stochastic"),
    )
    linearise_at: str = option(
        "prior", "exact and stochastic: the VAE's prior (no images needed) | images", choices=("prior", "images")
    )
    points: int = option(500, "latent images the Jacobian is averaged over", low=1)
    colour_stride: int = option(0, "exact: tokens this far apart are moved together; 0 = one at a time", low=0)
    probes: int = option(16, "stochastic: passes per batch of latent images", low=2)
    batch: int = option(4, "images per batch", low=1)


@dataclass(frozen=True)
class Convert:
    """``[convert]``: the base rewritten to take and return pixels, and the proof that nothing was lost."""

    verify_steps: int = option(64, "sampling steps of the float64 exactness test", low=1)
    tolerance: float = option(1e-9, "largest absolute error of that test; above it nothing is written", above=0)
    proof: str = option(
        "auto",
        "auto | whole | blocks: that test on the whole model where it fits in memory, or on one block of each kind",
        choices=("auto", "whole", "blocks"),
    )
    dtype: str = option(
        "keep", "keep | bf16 | fp16 | fp32: of the written transformer", choices=("keep", "bf16", "fp16", "fp32")
    )
    shard_size: float = option(0.0, "largest file of the transformer, GB; 0 = files as the base has them", low=0)


@dataclass(frozen=True)
class Readout:
    """``[readout]``: what the subspace leaves out, fitted in closed form to the frozen network's features."""

    parts: tuple[str, ...] = option(
        ("head", "offset", "prior", "last"),
        "head (in the out-projection's weights) | offset | prior (of the texture) | last (step over neighbours)",
        choices=("head", "offset", "prior", "last"),
    )
    source: str = option("", "images, as fit_subspace.source; empty = the base draws them itself")
    prompts: str = option("", "text file of prompts, one a line, for images that the base draws; empty = no prompt")
    images: int = option(2000, "images to fit on, the source's first; 0 = all", low=0)
    resolution: int = option(0, "images are scaled to about this squared; 0 = the model's own size", low=0)
    batch: int = option(4, "images per batch", low=1)
    max_broken: int = option(100, "unreadable images that are skipped; one more fails the run", low=0)
    window: int = option(3, "side of the neighbourhood that the last step sees, in tokens; odd", low=1)
    directions: int = option(512, "leading directions of the features that the last step sees, where there are more")
    ridge: float = option(1e-2, "penalty, as a share of the features' mean square", above=0)
    levels: float = option(0.3, "noise level up to which the detail head is fitted", above=0, high=1)
    precision: str = option("bf16", "bf16 | fp32 | fp64, of the network's forward", choices=("bf16", "fp32", "fp64"))


@dataclass(frozen=True)
class Data:
    """``[data]``: the training images, and the cache of what is computed from them once."""

    source: str = option(
        "",
        "a folder with captions | FILE.jsonl | SHARDS.tar | hf:NAME?split=... | photographs | the base's own",
    )
    resolution: int = option(1024, "images are scaled to about this squared, in aspect-ratio buckets", low=8)
    max_cut: float = option(0.2, "largest share of an image that its bucket may cut off; else dropped", low=0, high=1)
    enlarge: bool = option(False, "enlarge images smaller than their bucket; else they are dropped")
    max_broken: int = option(100, "unreadable or uncaptioned images that are skipped before the run fails", low=0)
    cache: str = option("cache", "folder of the cache; a relative one is inside the run directory")
    dtype: str = option("bf16", "bf16 | fp16 | fp32, of cached latents and text", choices=("bf16", "fp16", "fp32"))
    batch: int = option(4, "images encoded at a time", low=1)
    text_tokens: int = option(8192, "tokens of text encoded at a time, at least one caption's", low=1)
    exclude: tuple[str, ...] = option((), "images to leave out: names, as messages give them, or content digests")


@dataclass(frozen=True)
class Finetune:
    """``[finetune]``: training of the converted model on real pixels."""

    steps: int = option(15000, "optimizer steps", low=1)
    batch: int = option(256, "images per step", low=1)
    images: int = option(0, "training images; 0 = all of the source", low=0)
    micro_batch: int = option(4, "images per process and forward; 0 = batch / processes; else it accumulates", low=0)
    processes: int = option(0, "processes the recipe is meant for, checked; 0 = any", low=0)
    replicas: int = option(1, "groups of processes that hold a full copy each (hybrid sharding), such as nodes", low=1)
    trainable: str = option("lora", "full | lora (projections, final modulation, LoRA)", choices=("full", "lora"))
    lora_rank: int = option(256, "rank of LoRA", low=1)
    lora_alpha: float = option(256.0, "LoRA's update is scaled by lora_alpha / lora_rank", above=0)
    lora_dropout: float = option(0.05, "dropout of LoRA's input", low=0, high=1)
    lora_targets: tuple[str, ...] = option(
        ("base",), 'patterns (regular expressions) of full module names; "base" = the family\'s own list'
    )
    lr: float = option(1e-4, "peak learning rate", above=0)
    out_projection_lr: float = option(1e-3, "peak learning rate of the output projection", above=0)
    in_projection_factor: float = option(1.0, "learning rate of the input projection, as a multiple of lr", above=0)
    modulation_factor: float = option(1.0, "learning rate of the final modulation, as a multiple of lr", above=0)
    schedule: str = option("constant", "after warm-up: sqrt (falls to 0) | constant", choices=("sqrt", "constant"))
    warmup: int = option(100, "steps of linear warm-up", low=0)
    optimizer: str = option("adamw", "adamw | adamw-8bit (by torchao)", choices=("adamw", "adamw-8bit"))
    loss: str = option(
        "variance-reduction", "variance-reduction | flow-matching", choices=("variance-reduction", "flow-matching")
    )
    kappa: float = option(0.3, "strength of the variance reduction", low=0)
    perceptual: float = option(0.0, "weight of the LPIPS term; 0 = none", low=0)
    sigma_min: float = option(0.05, "noise level below which the velocity is not divided further", above=0, high=1)
    shift: float = option(
        17.0, "shift of the training's pixel noise levels at 1024 x 1024; it scales with sqrt(height width)", above=0
    )
    caption_dropout: float = option(0.1, "share of captions left empty, for guidance", low=0, high=1)
    clip: float = option(200.0, "largest gradient norm", above=0)
    clip_start: int = option(100, "step from which gradients are clipped", low=0)
    ema_gamma: float = option(7.0, "exponent of the power-law weight average; more = shorter memory", low=0)
    ema_start: int = option(100, "step at which the weight average begins", low=0)
    precision: str = option("bf16", "bf16 (autocast; gradients are summed in float32) | fp32", choices=("bf16", "fp32"))
    frozen_int8: bool = option(False, "hold the frozen Linear weights of a LoRA training in 8 bits; one process only")
    checkpointing: bool = option(True, "recompute activations in the backward pass")
    compile: bool = option(False, "compile every block")
    log_every: int = option(10, "steps between lines of the log", low=1)
    trackers: tuple[str, ...] = option(
        ("jsonl",),
        "jsonl (always written), tensorboard, wandb, trackio",
        choices=("jsonl", "tensorboard", "wandb", "trackio"),
    )
    validate_every: int = option(500, "steps between validations, the first at step 0; 0 = none", low=0)
    validation_images: int = option(64, "images held out for validation; 0 = no validation", low=0)
    sample_every: int = option(500, "steps between samples of the prompts, the first at step 0; 0 = none", low=0)
    prompts: tuple[str, ...] = option(
        (
            "a photo of a red bicycle leaning on a brick wall",
            "a watercolour of a lighthouse at dusk",
            "a cat reading a newspaper, studio light",
        ),
        "prompts of the sample images",
    )
    save_every: int = option(500, "steps between checkpoints", low=1)
    keep: int = option(2, "newest checkpoints kept", low=1)
    keep_final: bool = option(False, "keep the last checkpoint after finishing, to go on with more steps later")
    skip_limit: int = option(3, "steps in a row left out when a loss is not finite; one more ends the run", low=0)
    accept_new_data: bool = option(False, "go on from a checkpoint with other images than it was trained on")
    profile: int = option(0, "steps written to <run>/profile as a trace of torch.profiler; 0 = none", low=0)


@dataclass(frozen=True)
class Sample:
    """``[sample]``: how images are drawn, by ``generate`` and by ``eval``; unset is what the model says of itself."""

    steps: int | None = option(None, "solver steps per image", low=1)
    guidance: float | None = option(None, "classifier-free guidance scale; 1 = none", low=0)
    shift: float | None = option(
        None, "shift of the pixel noise levels at 1024 x 1024; it scales with sqrt(height width)", above=0
    )
    solver: str | None = option(None, "euler | heun | unipc", choices=("euler", "heun", "unipc"))
    orthogonal: bool | None = option(None, "remove the component of guidance parallel to x0_hat")
    gamut_clamp: bool | None = option(None, "clamp every x0_hat to colours a screen can show")
    height: int | None = option(None, "pixels", low=1)
    width: int | None = option(None, "pixels", low=1)


@dataclass(frozen=True)
class Eval:
    """``[eval]``: the scores of the report."""

    suite: tuple[str, ...] = option(
        ("geneval", "dpg-bench", "hpsv3"),
        "geneval, dpg-bench, hpsv3, fidelity",
        choices=("geneval", "dpg-bench", "hpsv3", "fidelity"),
    )
    samples: int = option(4, "images per prompt, at most the suite's own number", low=1)
    size: int = option(0, "side of an image in pixels; 0 = the model's own", low=0)
    prompts: int = option(0, "prompts of each suite, spread evenly; 0 = all", low=0)
    prompt_file: str = option("", "prompts of your own: GenEval metadata, or DPG-Bench texts; empty = the suite's")
    assets: str = option("", "folder of scorer weights and data; empty = the user's cache, see eval --fetch")
    dpg_judge: str = option("", "a vision-language model to judge DPG-Bench instead of mPLUG; empty = mPLUG")
    hpsv3_text: str = option("caption", "text HPSv3 is given: caption | script", choices=("caption", "script"))
    batch: int = option(4, "images per batch", low=1)
    reference: str = option("", "true images for fidelity: any image source; empty = the base's own, if it has any")
    fidelity_images: int = option(480, "images compared with true ones", low=2)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; frozen, so that what was resolved is what is written down.

    ``load`` makes one with the base's defaults; made by hand it has the generic ones. ``written`` is what the user
    wrote: the recipe's file, ``--set`` and flags.
    """

    base: str = option("", "the latent base: an alias, a folder or a Hub id", low=1)
    seed: int = option(0, "seed of everything random", low=0, high=2**63 - 1)
    threads: int = option(0, "CPU threads; 0 = all of the machine", low=0)
    device: str = option("auto", "auto | cuda | mps | xpu | cpu", choices=("auto", "cuda", "mps", "xpu", "cpu"))
    fit_subspace: FitSubspace = FitSubspace()
    convert: Convert = Convert()
    readout: Readout = Readout()
    data: Data = Data()
    finetune: Finetune = Finetune()
    sample: Sample = Sample()
    eval: Eval = Eval()
    written: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", self.base or _bundled())
        object.__setattr__(self, "threads", self.threads or _cpus())


def load(
    path: Path | str | None = None, overrides: Sequence[str] = (), *, fallback: str = "", **settings: Any
) -> Recipe:
    """Resolve a recipe: generic defaults < the base's own < the file < ``section.key=value`` overrides < ``settings``.

    ``settings`` are keys and tables (``load(base="flux2-klein-4b", finetune={"steps": 3})``); ``fallback`` is the base
    where nobody names one. Override values are TOML; what is not is a string, so ``sample.solver=heun`` needs no
    quotes. Raises UsageError naming file and key on an unreadable file, an unknown key or a wrong value.
    """
    blank, written = Recipe(), {} if path is None else read(Path(path))
    for override in overrides:
        table = parse_assignment(override, blank)
        merge(blank, table, "command line")
        written = layered(written, table)
    merge(blank, settings, "settings")
    written = layered(written, settings)
    base = written.get("base") or fallback or _bundled()
    own = {name: value for name, value in base_defaults(base).items() if name != "sample"}
    recipe = merge(Recipe(base=base), own, f"defaults of {base}")
    written = {name: value for name, value in written.items() if value != {}}
    return replace(merge(recipe, written, "recipe"), written=written)


def read(path: Path) -> dict[str, Any]:
    """What a recipe file says, and what the one says that it extends; each key checked."""
    table = _read(path)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise UsageError(f'{path}: extends must be one recipe file, such as "klein-9b.toml"')
    below = path.parent / parent
    extended = _read(below)
    if "extends" in extended:
        what = "it extends itself" if below.resolve() == path.resolve() else f"{below} extends another"
        raise UsageError(f"{path}: extends {parent!r}, but {what}; a recipe extends one that stands alone")
    return layered(extended, table)


def base_defaults(base: str) -> Mapping[str, Any]:
    """Recipe sections that come with a base: its folder's ``flux2pixel.toml``, else what is published of it.

    Its ``[sample]`` is what a model made of it says of itself. Empty for a base nothing is known of.
    """
    from flux2pixel.families import registry
    from flux2pixel.families.known import KNOWN

    bundled = registry.plugin(base)
    carried = (bundled.folder if bundled else Path(base)) / "flux2pixel.toml"
    if carried.is_file():
        return _read(carried)
    known = next((known for alias, known in KNOWN.items() if base in (alias, known.hub)), None)
    if known is None:
        return {}
    defaults = known.defaults
    own = {"steps": defaults.steps, "guidance": defaults.guidance}
    return {"sample": own | {"height": defaults.height, "width": defaults.width}}


def as_dict(recipe: Recipe, sections: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as nested dictionaries that JSON and TOML can both hold; with ``sections`` only those."""
    table = plain(recipe)
    return {k: v for k, v in table.items() if not (sections and isinstance(v, dict) and k not in sections)}


def dumps(recipe: Recipe, *, comments: bool = False, sections: Sequence[str] = ()) -> str:
    """The whole recipe as TOML that ``load`` reads back to an equal one; or only those ``sections`` of it.

    With ``comments`` each key has its meaning beside it, and one that is unset stands there as a comment.
    """
    lines = [f"format = {FORMAT}", *_lines(recipe, comments)]
    for name in options(recipe):
        value = getattr(recipe, name)
        if is_dataclass(value) and (not sections or name in sections):
            lines += ["", f"[{name}]", *_lines(value, comments)]
    return "\n".join(lines) + "\n"


def template(base: str) -> str:
    """A recipe of ``base`` to edit: every key with its meaning and its default, each but the base's a comment."""
    lines = dumps(load(base=base), comments=True).splitlines()
    lines = [f"threads = 0{line[line.index('  #') :]}" if line.startswith("threads =") else line for line in lines]
    kept = ("format =", "base =", "[", "#")
    return "\n".join(line if not line or line.startswith(kept) else f"# {line}" for line in lines) + "\n"


def dumps_written(written: Mapping[str, Any]) -> str:
    """What a user wrote, as TOML."""
    tables = {name: value for name, value in written.items() if isinstance(value, Mapping)}
    lines = [f"{name} = {toml(value)}" for name, value in written.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml(value)}" for key, value in table.items())]
    return "\n".join(lines).strip() + "\n"


def setting(key: str, value: str | int | float | Sequence[str]) -> str:
    """The override that sets ``key`` to exactly ``value``, quoted as TOML."""
    return f"{key}={toml(value)}"


def _read(path: Path) -> dict[str, Any]:
    """One file's table, checked, without its ``format``."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{path}: no such recipe file; recipes are TOML, see recipes/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    version = table.pop("format", 1 if _whole(table) else FORMAT)
    if version not in (1, FORMAT):
        raise UsageError(f"{path}: format = {version!r}; this release reads 1 and {FORMAT}: install a newer one")
    merge(Recipe(), {name: value for name, value in table.items() if name != "extends"}, str(path))
    return _from_format_1(table, path) if version == 1 else table


def _whole(table: Mapping[str, Any]) -> bool:
    """Whether a file without a format is a whole recipe, as releases before format 2 wrote into every run."""
    sample = {"steps", "guidance", "shift", "solver", "orthogonal", "gamut_clamp"}
    return table.keys() >= options(Recipe()).keys() and table["sample"].keys() >= sample


def _from_format_1(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe of before format 2: its training shift was that of its own resolution, its sampler's of the latents."""
    finetune, sample = table.get("finetune", {}), dict(table.get("sample", {}))
    if "shift" in finetune:
        side = table.get("data", {}).get("resolution", 32)
        finetune = finetune | {"shift": finetune["shift"] * 1024 / side}
    if sample.pop("shift", 1.0) != 1:
        raise UsageError(
            f"{path}: of an older release, whose sample.shift was that of latent noise levels; write format = {FORMAT} "
            "on its first line and sample.shift as that of pixel noise levels at 1024 x 1024"
        )
    return table | {name: value for name, value in (("finetune", finetune), ("sample", sample)) if value}


def _lines(table: Any, comments: bool) -> list[str]:
    lines = []
    for name, item in options(table).items():
        value, doc = getattr(table, name), item.metadata.get("doc", "")
        if is_dataclass(value) or (value is None and not comments):
            continue
        line = f"# {name} = the model's own" if value is None else f"{name} = {toml(value)}"
        lines.append(f"{line}  # {doc}" if comments else line)
    return lines


def _bundled() -> str:
    """The base that comes with the package."""
    from flux2pixel.families import registry

    return next(iter(registry.names()), "")


def _cpus() -> int:
    """CPUs that this process may use; fewer if OMP_NUM_THREADS says so, unless a launcher set that by itself."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(count, int(told)) if told.isdigit() and int(told) and "RANK" not in os.environ else count
