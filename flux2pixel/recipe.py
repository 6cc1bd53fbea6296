"""The recipe: every setting of a run, typed, with its meaning, unit and default in one place.

A recipe is TOML. What it leaves out takes the default below; what it misspells is refused with a suggestion.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import UsageError


def _option(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """Declare a field: its default (whose type is the field's), its meaning, and the values it may take."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "above": above, "high": high})


@dataclass(frozen=True)
class FitSubspace:
    """``[fit_subspace]``: the low-rank basis that ties pixels to the base's latents."""

    source: str = _option(
        "scenes", "scenes | photographs (scikit-learn's) | a folder | MANIFEST.jsonl | SHARDS.tar | hf:NAME | a cache"
    )
    images: int = _option(4000, "images to fit on, the source's first; 0 = all", low=0)
    resolution: int = _option(0, "images are scaled to about this squared, aspect ratio kept; 0 = own size", low=0)
    max_broken: int = _option(100, "unreadable images that are skipped; one more fails the run", low=0)
    method: str = _option(
        "procrustes",
        "procrustes | pca | vae-jacobian | random",
        choices=("procrustes", "pca", "vae-jacobian", "random"),
    )
    rank: int = _option(0, "columns of the basis; 0 = width of a latent token", low=0)
    center: bool = _option(False, "pca: about the mean of the tokens")
    jacobian: str = _option(
        "smoothed",
        "vae-jacobian: smoothed over the VAE's prior | exact | stochastic",
        choices=("smoothed", "exact", "stochastic"),
    )
    linearise_at: str = _option(
        "prior", "exact and stochastic: the VAE's prior (no images needed) | images", choices=("prior", "images")
    )
    points: int = _option(500, "latent images the Jacobian is averaged over", low=1)
    colour_stride: int = _option(0, "exact: tokens this far apart are moved together; 0 = one at a time", low=0)
    probes: int = _option(16, "stochastic: passes per batch of latent images", low=2)
    batch: int = _option(250, "images per batch", low=1)


@dataclass(frozen=True)
class Convert:
    """``[convert]``: the base rewritten to take and return pixels, and the proof that nothing was lost."""

    verify_steps: int = _option(64, "sampling steps of the float64 exactness test", low=1)
    tolerance: float = _option(1e-9, "largest absolute error of that test; above it nothing is written", above=0)
    dtype: str = _option(
        "keep", "keep | bf16 | fp16 | fp32: of the written transformer", choices=("keep", "bf16", "fp16", "fp32")
    )
    shard_size: float = _option(0.0, "largest file of the transformer, GB; 0 = files as the base has them", low=0)


@dataclass(frozen=True)
class Readout:
    """``[readout]``: what the subspace leaves out, fitted in closed form to the frozen network's features."""

    parts: tuple[str, ...] = _option(
        ("head", "offset", "prior", "last"),
        "head (in the out-projection's weights) | offset | prior (of the texture) | last (step over neighbours)",
        choices=("head", "offset", "prior", "last"),
    )
    source: str = _option("", "images, as fit_subspace.source; empty = the base draws them itself")
    prompts: str = _option("", "text file of prompts, one a line, for images that the base draws; empty = no prompt")
    images: int = _option(8000, "images to fit on, the source's first; 0 = all", low=0)
    resolution: int = _option(0, "images are scaled to about this squared; 0 = the model's own size", low=0)
    batch: int = _option(100, "images per batch", low=1)
    max_broken: int = _option(100, "unreadable images that are skipped; one more fails the run", low=0)
    window: int = _option(3, "side of the neighbourhood that the last step sees, in tokens; odd", low=1)
    directions: int = _option(512, "leading directions of the features that the last step sees, where there are more")
    ridge: float = _option(1e-2, "penalty, as a share of the features' mean square", above=0)
    levels: float = _option(0.3, "noise level up to which the detail head is fitted", above=0, high=1)
    precision: str = _option("bf16", "bf16 | fp32 | fp64, of the network's forward", choices=("bf16", "fp32", "fp64"))


@dataclass(frozen=True)
class Data:
    """``[data]``: the training images, and the cache of what is computed from them once."""

    source: str = _option(
        "scenes",
        "scenes | photographs | a folder | FILE.jsonl | SHARDS.tar | hf:NAME?split=... (see images/sources.py)",
    )
    resolution: int = _option(32, "images are scaled to about this many pixels squared, in aspect-ratio buckets", low=8)
    max_cut: float = _option(0.2, "largest share of an image that its bucket may cut off; else dropped", low=0, high=1)
    enlarge: bool = _option(False, "enlarge images smaller than their bucket; else they are dropped")
    max_broken: int = _option(100, "unreadable or uncaptioned images that are skipped before the run fails", low=0)
    cache: str = _option("cache", "folder of the cache; a relative one is inside the run directory")
    dtype: str = _option("fp16", "bf16 | fp16 | fp32, of cached latents and text", choices=("bf16", "fp16", "fp32"))
    batch: int = _option(50, "images encoded at a time", low=1)


@dataclass(frozen=True)
class Finetune:
    """``[finetune]``: training of the converted model on real pixels."""

    steps: int = _option(240, "optimizer steps", low=1)
    batch: int = _option(64, "images per step", low=1)
    images: int = _option(10000, "training images; 0 = all of the source", low=0)
    micro_batch: int = _option(0, "images per process and forward; 0 = batch / processes; else it accumulates", low=0)
    processes: int = _option(0, "processes the recipe is meant for, checked; 0 = any", low=0)
    replicas: int = _option(1, "groups of processes that hold a full copy each (hybrid sharding), such as nodes", low=1)
    trainable: str = _option("full", "full | lora (projections, final modulation, LoRA)", choices=("full", "lora"))
    lora_rank: int = _option(256, "rank of LoRA", low=1)
    lora_alpha: float = _option(256.0, "LoRA's update is scaled by lora_alpha / lora_rank", above=0)
    lora_dropout: float = _option(0.05, "dropout of LoRA's input", low=0, high=1)
    lora_targets: tuple[str, ...] = _option(
        ("base",), 'patterns (regular expressions) of full module names; "base" = the family\'s own list'
    )
    lr: float = _option(5e-4, "peak learning rate", above=0)
    out_projection_lr: float = _option(1.5e-3, "peak learning rate of the output projection", above=0)
    in_projection_factor: float = _option(1.0, "learning rate of the input projection, as a multiple of lr", above=0)
    modulation_factor: float = _option(1.0, "learning rate of the final modulation, as a multiple of lr", above=0)
    schedule: str = _option("sqrt", "after warm-up: sqrt (falls to 0) | constant", choices=("sqrt", "constant"))
    warmup: int = _option(20, "steps of linear warm-up", low=0)
    optimizer: str = _option("adamw", "adamw | adamw-8bit (needs bitsandbytes)", choices=("adamw", "adamw-8bit"))
    loss: str = _option(
        "variance-reduction", "variance-reduction | flow-matching", choices=("variance-reduction", "flow-matching")
    )
    kappa: float = _option(0.3, "strength of the variance reduction", low=0)
    perceptual: float = _option(0.0, "weight of the LPIPS term; 0 = none", low=0)
    sigma_min: float = _option(0.05, "noise level below which the velocity is not divided further", above=0, high=1)
    shift: float = _option(1.0, "shift of the training noise levels; 1 = none, more = noisier", above=0)
    caption_dropout: float = _option(0.1, "share of captions left empty, for guidance", low=0, high=1)
    clip: float = _option(1.0, "largest gradient norm", above=0)
    clip_start: int = _option(0, "step from which gradients are clipped", low=0)
    ema_gamma: float = _option(7.0, "exponent of the power-law weight average; more = shorter memory", low=0)
    ema_start: int = _option(0, "step at which the weight average begins", low=0)
    precision: str = _option(
        "bf16", "bf16 (autocast; gradients are summed in float32) | fp32", choices=("bf16", "fp32")
    )
    frozen_int8: bool = _option(False, "hold the frozen Linear weights of a LoRA training in 8 bits; one process only")
    checkpointing: bool = _option(False, "recompute activations in the backward pass")
    compile: bool = _option(False, "compile every block")
    log_every: int = _option(20, "steps between lines of the log", low=1)
    trackers: tuple[str, ...] = _option(
        ("jsonl",),
        "jsonl (always written), tensorboard, wandb, trackio",
        choices=("jsonl", "tensorboard", "wandb", "trackio"),
    )
    validate_every: int = _option(240, "steps between validations, the first at step 0", low=1)
    validation_images: int = _option(64, "images held out for validation; 0 = no validation", low=0)
    sample_every: int = _option(240, "steps between samples of the prompts, the first at step 0", low=1)
    prompts: tuple[str, ...] = _option(
        ("a photo of a red circle", "a photo of four triangles", "a photo of a blue circle and a white square"),
        "prompts of the sample images",
    )
    save_every: int = _option(200, "steps between checkpoints", low=1)
    keep: int = _option(2, "newest checkpoints kept", low=1)
    keep_final: bool = _option(False, "keep the last checkpoint after finishing, to go on with more steps later")


@dataclass(frozen=True)
class Sample:
    """``[sample]``: how images are drawn, by ``generate`` and by ``eval``."""

    steps: int = _option(16, "solver steps per image", low=1)
    guidance: float = _option(3.0, "classifier-free guidance scale; 1 = none", low=0)
    shift: float = _option(1.0, "shift of the noise levels; 1 = none, more = noisier", above=0)
    solver: str = _option("euler", "euler | heun | unipc", choices=("euler", "heun", "unipc"))
    orthogonal: bool = _option(False, "remove the component of guidance parallel to x0_hat")
    gamut_clamp: bool = _option(True, "clamp every x0_hat to colours a screen can show")


@dataclass(frozen=True)
class Eval:
    """``[eval]``: the scores of the report."""

    suite: tuple[str, ...] = _option(
        ("geneval", "fidelity"),
        "geneval, dpg-bench, hpsv3, fidelity",
        choices=("geneval", "dpg-bench", "hpsv3", "fidelity"),
    )
    samples: int = _option(4, "images per prompt, at most the suite's own number", low=1)
    size: int = _option(0, "side of an image in pixels; 0 = 1024, or the miniature's 32", low=0)
    prompts: int = _option(0, "prompts of each suite, spread evenly; 0 = all", low=0)
    prompt_file: str = _option("", "prompts of your own: GenEval metadata, or DPG-Bench texts; empty = the suite's")
    assets: str = _option("", "folder of scorer weights and data; empty = the user's cache, see eval --fetch")
    dpg_judge: str = _option("", "a vision-language model to judge DPG-Bench instead of mPLUG; empty = mPLUG")
    hpsv3_text: str = _option("caption", "text HPSv3 is given: caption | script", choices=("caption", "script"))
    batch: int = _option(120, "images per batch", low=1)
    reference: str = _option("", "true images for fidelity: a folder, or any image source; empty = the miniature's own")
    fidelity_images: int = _option(480, "images compared with true ones", low=2)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; frozen, so that what was resolved is what is written down."""

    base: str = _option("klein-tiny", "the latent base: an alias or a folder")
    seed: int = _option(0, "seed of everything random", low=0, high=2**63 - 1)
    threads: int = _option(2, "CPU threads of this machine, shared by its processes; 0 = all", low=0)
    fit_subspace: FitSubspace = FitSubspace()
    convert: Convert = Convert()
    readout: Readout = Readout()
    data: Data = Data()
    finetune: Finetune = Finetune()
    sample: Sample = Sample()
    eval: Eval = Eval()


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (``None``: the defaults) and apply ``section.key=value`` overrides, in order.

    Override values are TOML; what is not TOML is taken as a string, so ``sample.solver=heun`` needs no quotes.
    Raises ``UsageError`` naming the file and the key on an unreadable file, an unknown key or a wrong value.
    """
    recipe = Recipe()
    if path is not None:
        recipe = _merge(recipe, _read(path), str(path))
    for override in overrides:
        recipe = _override(recipe, override)
    return recipe


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested dictionaries that JSON and TOML can both hold."""
    table: dict[str, Any] = _plain(recipe)
    return table


def dumps(recipe: Recipe, *, comments: bool = False) -> str:
    """Return the recipe as TOML that ``load`` reads back to an equal recipe, with each field's meaning if asked."""
    lines: list[str] = []
    _dump(recipe, lines, comments)
    for section in fields(recipe):
        value = getattr(recipe, section.name)
        if is_dataclass(value):
            lines += ["", f"[{section.name}]"]
            _dump(value, lines, comments)
    return "\n".join(lines) + "\n"


def setting(key: str, value: str | int | Sequence[str]) -> str:
    """Return the override that sets ``key`` to exactly ``value``, quoted as TOML."""
    return f"{key}={_toml(value)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{path}: no such recipe file; recipes are TOML, see recipes/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error


def _override(recipe: Recipe, override: str) -> Recipe:
    key, equals, text = (part.strip() for part in override.partition("="))
    if not (key and equals):
        raise UsageError(f"--set {override}: write it as section.key=value, such as sample.steps=8")
    value: Any = text
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            value = parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    *sections, name = key.split(".")
    target: Any = recipe
    for section in sections:
        target = getattr(target, section, None)
    if not isinstance(value, str) and isinstance(getattr(target, name, None), str):
        value = text  # a folder may be called 2024
    table: dict[str, Any] = {name: value}
    for section in reversed(sections):
        table = {section: table}
    changed: Recipe = _merge(recipe, table, "command line")
    return changed


def _merge(target: Any, table: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """Return the dataclass ``target`` with the values of ``table``, each checked."""
    known = {item.name: item for item in fields(target)}
    changes = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise UsageError(
                f"{where}: unknown {'key' if prefix else 'section or key'} {key!r}; {_suggest(key, known)}"
            )
        current = getattr(target, name)
        if not is_dataclass(current):
            changes[name] = _check(known[name], value, f"{where}: {key}")
        elif isinstance(value, Mapping):
            changes[name] = _merge(current, value, where, f"{key}.")
        else:
            raise UsageError(
                f"{where}: {key} is a section; set one of its keys, such as {key}.{fields(current)[0].name}"
            )
    return replace(target, **changes)


def _suggest(key: str, known: Mapping[str, Any]) -> str:
    """Return the nearest key of the same section, else of any section, else the list of those known."""
    prefix, _, name = key.rpartition(".")
    everywhere = {
        inner.name: f"{outer.name}.{inner.name}"
        for outer in fields(Recipe)
        if is_dataclass(outer.default)
        for inner in fields(outer.default)
    }
    near = difflib.get_close_matches(name, known, n=1)
    if near and name not in everywhere:
        return f"did you mean {f'{prefix}.' if prefix else ''}{near[0]}?"
    if near := difflib.get_close_matches(name, everywhere, n=1):
        return f"did you mean {everywhere[near[0]]}?"
    return f"known here: {', '.join(known)}"


def _check(item: Field[Any], value: Any, where: str) -> Any:
    """Return ``value`` as the type of the field's default, or raise ``UsageError`` with what it must be."""
    default: Any = item.default
    rule = item.metadata
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(entry, str) for entry in value):
            raise UsageError(f"{where} = {_toml(value)} must be a list of strings, such as {_toml(default)}")
        for entry in value:
            _check_choice(entry, rule["choices"], where)
        return tuple(dict.fromkeys(value))
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise UsageError(f"{where} = {_toml(value)} must be {words[type(default)]}, such as {_toml(default)}")
    if isinstance(value, str):
        if not value and default:
            raise UsageError(f'{where} = "" must not be empty; its default is {_toml(default)}')
        _check_choice(value, rule["choices"], where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(value, rule, where)
    return value


def _check_choice(value: str, choices: tuple[str, ...], where: str) -> None:
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{where} = {_toml(value)} must be one of {', '.join(choices)}{hint}")


def _check_range(value: float, rule: Mapping[str, Any], where: str) -> None:
    low, above, high = rule["low"], rule["above"], rule["high"]
    if not math.isfinite(value):
        raise UsageError(f"{where} = {value} must be finite")
    if low is not None and value < low:
        raise UsageError(f"{where} = {value} must be at least {low}")
    if above is not None and value <= above:
        raise UsageError(f"{where} = {value} must be above {above}")
    if high is not None and value > high:
        raise UsageError(f"{where} = {value} must be at most {high}")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _dump(table: Any, lines: list[str], comments: bool) -> None:
    for item in fields(table):
        value = getattr(table, item.name)
        if not is_dataclass(value):
            comment = f"  # {item.metadata['doc']}" if comments else ""
            lines.append(f"{item.name} = {_toml(value)}{comment}")


def _toml(value: Any) -> str:
    """Return ``value`` as TOML; a JSON string is a TOML basic string once DEL is escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(entry) for entry in value)}]"
    return repr(value) if isinstance(value, (int, float)) else str(value)
