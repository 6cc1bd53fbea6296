"""The eval stage: generate with every model, score, and write ``report.html`` and ``report.json``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2pixel import __version__, bases, files
from flux2pixel.asymflow.pipeline import LatentModel, PixelModel, open_model, seeded_noise, to_bytes
from flux2pixel.bases.base import take
from flux2pixel.errors import UsageError
from flux2pixel.evaluate.claims import claims
from flux2pixel.evaluate.fidelity import measure
from flux2pixel.evaluate.geneval import Verdict, judge
from flux2pixel.evaluate.interval import mean_interval, tag_mean_interval
from flux2pixel.evaluate.pictures import basis_vectors
from flux2pixel.evaluate.report import write_report
from flux2pixel.miniature import detector, world
from flux2pixel.progress import bar, say
from flux2pixel.recipe import Recipe, as_dict

FIRST_REFERENCE = 3_000_000  # true renders that the fidelity measures compare with
FIRST_CEILING = 4_000_000  # other true renders: what a perfect model would score


@dataclass
class Scored:
    """One model's images (prompts, samples, H, W, 3) uint8 and their verdicts."""

    name: str
    path: str
    images: np.ndarray
    verdicts: list[list[Verdict]]
    seconds_per_image: float

    @property
    def correct(self) -> list[list[bool]]:
        return [[v.correct for v in row] for row in self.verdicts]


def evaluate(recipe: Recipe, run: Path, models: list[Path] | None = None, out: Path | None = None) -> Path:
    """Score the models (default: base, converted and finetuned of the run) on the miniature's suite.

    Writes report.json beside report.html and returns the latter's path.
    """
    started = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    if recipe.base != "klein-tiny":
        raise UsageError("eval: only the miniature's detector is wired in this version; use base klein-tiny")
    named = {name_of(path): path for path in models} if models else _default_models(recipe, run)
    say("eval: " + ", ".join(f"{name} {path}" for name, path in named.items()))
    posed = _prompts(recipe)
    scored = [_score(name, open_model(path, recipe, run), posed, recipe) for name, path in named.items()]
    report = _report(recipe, run, posed, scored)
    report["seconds"] = _seconds(run, time.perf_counter() - started)
    page = out or run / "report.html"
    shown = {m["prompt"]: {s.name: list(s.images[i]) for s in scored} for i, m in enumerate(posed)}
    files.write_json(page.with_suffix(".json"), report)
    write_report(report, shown, page)
    for one in scored:
        say(_line(one, report["models"][one.name]))
    say(f"wrote {page}")
    return page


def _line(one: Scored, figures: dict[str, Any]) -> str:
    overall = figures["geneval"].get("overall")
    score = f"{overall['score']:.3f} [{overall['low']:.3f}, {overall['high']:.3f}]" if overall else "partial"
    texture = figures["fidelity"]["texture_frechet"]
    return f"{one.name:>10}: GenEval {score}, texture Fréchet {texture:.4f}, {one.seconds_per_image:.3f} s per image"


def name_of(path: Path) -> str:
    """What a report calls a model: its folder's name, or "base" for a latent one."""
    return path.name if (path / "asymflow.json").is_file() else "base"


def _default_models(recipe: Recipe, run: Path) -> dict[str, Path]:
    found = {"base": bases.resolve(recipe.base)}
    found |= {name: run / name for name in ("converted", "finetuned") if (run / name / "asymflow.json").is_file()}
    return found


def _prompts(recipe: Recipe) -> list[dict]:
    """The suite's metadata; with ``eval.prompts`` = n, n of them spread evenly over the tags' order."""
    wanted = recipe.eval.prompts or len(world.EVAL_METADATA)
    keep = np.linspace(0, len(world.EVAL_METADATA) - 1, min(wanted, len(world.EVAL_METADATA))).round().astype(int)
    return [world.EVAL_METADATA[i] for i in keep]


def _score(name: str, model: LatentModel | PixelModel, posed: Sequence[dict], recipe: Recipe) -> Scored:
    settings = recipe.eval
    patch = model.patch if isinstance(model, PixelModel) else model.base.patch_size
    text, empty = model.text([m["prompt"] for m in posed]), model.text([""])
    keys = [(p, s) for p in range(len(posed)) for s in range(settings.samples)]
    size, made, seconds = (world.SIZE, world.SIZE), [], 0.0
    with bar(f"eval {name}", len(keys)) as progress:
        for first in range(0, len(keys), settings.batch):
            batch = keys[first : first + settings.batch]
            noise = seeded_noise(
                [(recipe.seed * 1000 + p, s) for p, s in batch], (world.SIZE // patch) ** 2, 3 * patch**2
            )
            begun = time.perf_counter()
            rows = torch.tensor([p for p, _ in batch])
            made.append(to_bytes(model(take(text, rows), take(empty, rows * 0), noise, size)))
            seconds += time.perf_counter() - begun
            progress.advance(len(batch))
    images = np.concatenate(made).reshape(len(posed), settings.samples, world.SIZE, world.SIZE, 3)
    verdicts = [[_judge(m, image) for image in row] for m, row in zip(posed, images, strict=True)]
    return Scored(name, str(model.folder), images, verdicts, seconds / len(keys))


def _judge(metadata: dict, image: np.ndarray) -> Verdict:
    return judge(metadata, detector.detect(image), lambda _, box: detector.classify_color(image, box))


def _ceiling(posed: Sequence[dict]) -> list[list[Verdict]]:
    """Verdicts on true renders of the same prompts: the detector's own score."""
    return [
        [_judge(m, world.sample(FIRST_CEILING + 10 * i + j, metadata=m, held_out=frozenset()).image) for j in range(4)]
        for i, m in enumerate(posed)
    ]


def summarise(posed: Sequence[dict], correct: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """GenEval's numbers: every tag's share with its 95 % interval, overall as the mean of the tags.

    A tag without prompts is absent, and then the overall is too.
    """
    tags: dict[str, dict] = {}
    for tag in world.TAGS:
        rows = [c for m, c in zip(posed, correct, strict=True) if m["tag"] == tag]
        if rows:
            score, low, high = mean_interval(rows)
            tags[tag] = {"score": score, "low": low, "high": high, "images": sum(map(len, rows))}
    if len(tags) < len(world.TAGS):
        return {"tags": tags}
    score, low, high = tag_mean_interval(_by_tag(posed, [float(np.mean(c)) for c in correct]))
    return {"tags": tags, "overall": {"score": score, "low": low, "high": high}}


def _by_tag(posed: Sequence[dict], scores: Sequence[float]) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for metadata, score in zip(posed, scores, strict=True):
        grouped.setdefault(metadata["tag"], []).append(score)
    return grouped


def _difference(posed: Sequence[dict], one: Scored, other: Scored) -> dict[str, float]:
    """Overall of ``one`` minus that of ``other``, prompt by prompt."""
    pairs = zip(one.correct, other.correct, strict=True)
    gaps = [float(np.mean(mine) - np.mean(theirs)) for mine, theirs in pairs]
    return dict(zip(("difference", "low", "high"), tag_mean_interval(_by_tag(posed, gaps)), strict=True))


def _report(recipe: Recipe, run: Path, posed: list[dict], scored: list[Scored]) -> dict[str, Any]:
    count = recipe.eval.fidelity_images
    # References pose the suite's own prompts in the suite's proportions, so that content does not count as infidelity.
    reference = _renders(posed, count, FIRST_REFERENCE)
    report: dict[str, Any] = {"base": recipe.base, "models": {}, "settings": as_dict(recipe), "versions": _versions()}
    for one in scored:
        fidelity = measure(one.images.reshape(-1, *one.images.shape[2:])[:count], reference)
        report["models"][one.name] = {
            "geneval": summarise(posed, one.correct),
            "fidelity": fidelity,
            "steps": recipe.sample.steps,
            "seconds_per_image": one.seconds_per_image,
            "path": one.path,
        }
    ceiling = summarise(posed, [[v.correct for v in row] for row in _ceiling(posed)])
    report["detector_ceiling"] = float(np.mean([t["score"] for t in ceiling["tags"].values()]))
    real = _renders(posed, count, FIRST_CEILING)
    report["fidelity_ceiling"] = {
        "real": measure(real, reference),
        "vae": measure(_through_vae(recipe, real), reference),
    }
    by_name = {one.name: one for one in scored}
    report["paired"] = {
        f"{name}-base": _difference(posed, one, by_name["base"])
        for name, one in by_name.items()
        if name != "base" and "base" in by_name
    }
    report |= _provenance(run)
    report["claims"] = claims(report)
    report["prompts"] = [
        {
            "prompt": m["prompt"],
            "tag": m["tag"],
            "held_out": m["prompt"] in world.HELD_OUT,
            "verdicts": {s.name: [{"correct": v.correct, "reason": v.reason} for v in s.verdicts[i]] for s in scored},
        }
        for i, m in enumerate(posed)
    ]
    return report


def _renders(posed: Sequence[dict], count: int, start: int) -> np.ndarray:
    drawn = [world.sample(start + i, metadata=posed[i % len(posed)], held_out=frozenset()).image for i in range(count)]
    return np.stack(drawn)


def _through_vae(recipe: Recipe, images: np.ndarray) -> np.ndarray:
    """The base VAE's reconstruction: the ceiling of anything latent."""
    base = bases.open_base(recipe.base)
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    parts = [base.decode(base.encode(part), *images.shape[1:3]) for part in rgb.split(120)]
    return to_bytes(torch.cat(parts))


def _provenance(run: Path) -> dict[str, Any]:
    """Exactness, basis and training figures that the earlier stages left in the run directory."""
    found: dict[str, Any] = {}
    conversion, training = run / "converted" / "conversion.json", run / "finetuned" / "finetune.json"
    if conversion.is_file():
        found["exactness"] = json.loads(conversion.read_text())["exactness"]
    if (run / "subspace.json").is_file():
        found["basis"] = json.loads((run / "subspace.json").read_text())
        found["basis"]["vectors"] = basis_vectors(run / "subspace.safetensors", count=16)
    if training.is_file():
        record = json.loads(training.read_text())
        found["training"] = {"curve": record["curve"], "images_seen": record["images_seen"]}
    return found


def _seconds(run: Path, mine: float) -> dict[str, float]:
    path = run / "seconds.json"
    seconds = json.loads(path.read_text()) if path.is_file() else {}
    seconds["eval"] = mine
    seconds["total"] = sum(seconds.get(k, 0.0) for k in ("fit_subspace", "convert", "finetune", "eval"))
    return seconds


def _versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"flux2pixel": __version__, "python": platform.python_version()} | found
