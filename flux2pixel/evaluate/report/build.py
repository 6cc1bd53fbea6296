"""The report: one HTML file that holds everything it shows and asks nothing of a network.

It works with thousands of images a model because it loads none of them at once: every prompt's images are one small
contact sheet, kept in the page as text that the browser does not decode until its card comes near the view. The
originals lie in their folders; enlarging a picture opens one.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2pixel.evaluate.report import tables
from flux2pixel.evaluate.report.sheets import SIDE, Sheet, sheets, side_for, thumbnail
from flux2pixel.evaluate.report.tables import Report, get, model_names, score_of
from flux2pixel.evaluate.store import Digests
from flux2pixel.evaluate.suite import Sample
from flux2pixel.runtime import page
from flux2pixel.runtime.page import Line, data_uri, finite, flat, line_chart, number

STRIP = 12  # prompts in the row of pictures at the top
BASIS = {
    "method": "Method", "rank": "Rank", "patch_dim": "Patch dimension", "scale": "Scale",
    "captured_energy": "Captured energy", "alignment_residual": "Alignment residual",
    "orthonormality_error": "Orthonormality error", "half_split_angle_deg": "Angle between halves (degrees)",
}  # fmt: skip
# An absolute path of two parts or more within a text; the group is its last part.
PATH = re.compile(r"(?<![\w.:/~<])(?:~|[A-Za-z]:)?(?:[/\\][^/\\\s,;:'\"<>]+)+[/\\]([^/\\\s,;:'\"<>]+)")
EXACTNESS = {"max_abs_error": "Largest absolute error", "steps": "Steps", "dtype": "Arithmetic"}


@dataclass(frozen=True)
class Gallery:
    """The images that a report shows: ``shots[(suite, prompt id)][model]`` lists samples, ``cache`` keeps sheets."""

    shots: Mapping[tuple[str, str], Mapping[str, Sequence[Sample]]]
    cache: Path
    digests: Digests = field(default_factory=lambda: Digests(Path(os.devnull)))


def write_report(report: Report, gallery: Gallery | None, path: Path) -> None:
    """Write ``report`` as one self-contained HTML file at ``path``, whole or not at all.

    Any part of ``report`` may be missing; its section is then left out. The page is streamed, so that memory does not
    grow with the number of images. Raises Flux2PixelError if the file cannot be written.
    """
    report = for_readers(report, path.parent)
    rows, shown = _prompts(report, gallery, path.parent)
    names = model_names(report)
    basis, training = report.get("basis") or {}, report.get("training") or {}
    page.write(
        path,
        Path(__file__).parent / "report.html",
        title=f"AsymFlow: {report.get('base', 'a latent base')}, from latents to pixels",
        verdict=_verdict(report),
        names=names,
        called=tables.NAMES,
        short={name: tables.SHORT.get(name, name) for name in names},
        strip=_strip(report, gallery, path.parent),
        rows=tables.summary(report),
        words=tables.WORDS,
        claims=report.get("claims") or [],
        comparable={tables.LABELS.get(k, k): v for k, v in (report.get("comparable") or {}).items()},
        vectors=[uri for uri in basis.get("vectors") or [] if str(uri).startswith("data:image/")],
        basis=[(label, basis.get(key)) for key, label in BASIS.items() if basis.get(key) is not None],
        spectrum=_spectrum(basis),
        curves=_curves(training),
        training=[("Images seen", training["images_seen"])] if "images_seen" in training else [],
        exactness=[(v, report["exactness"].get(k)) for k, v in EXACTNESS.items()] if report.get("exactness") else [],
        decided=_decided(report),
        reference=flat(report.get("fidelity_reference") or {}),
        settings={k: flat(report[k.lower()]) for k in ("Seconds", "Settings", "Versions") if report.get(k.lower())},
        filters=_filters(report),
        data={"names": {name: tables.SHORT.get(name, name) for name in names}, "prompts": rows},
        sheets=_sheets(shown, gallery),
    )


def for_readers(value: Any, home: Path) -> Any:
    """The report without the paths of the machine that made it.

    A path inside ``home`` (the run) becomes relative to it; of any other absolute path only its last part stays.
    Prompts and reasons are left as they are.
    """
    if isinstance(value, Mapping):
        return {key: item if key == "prompts" else for_readers(item, home) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_readers(item, home) for item in value]
    if not isinstance(value, str | Path) or str(value).startswith("data:"):
        return value
    inside = str(value).replace(f"{home.resolve()}{os.sep}", "").replace(str(home.resolve()), ".")
    if Path(inside).is_absolute() and Path(inside).exists():
        return Path(inside).name
    return PATH.sub(r"\1", inside)


def _verdict(report: Report) -> str:
    models = report.get("models") or {}
    parts = []
    for name in ("finetuned", "readout", "converted"):
        pairs = {
            suite: [finite(get(models, one, key, "overall", "score")) for one in (name, "base")]
            for suite, key in tables.KEYS.items()
        }
        suite = next((suite for suite, pair in pairs.items() if None not in pair), None)
        if suite is None:
            continue
        ours, theirs = (score_of(score, tables.TOPS.get(suite)) for score in pairs[suite])
        parts.append(
            f"the {name} pixel model scores {ours} on {tables.LABELS[suite]} where its latent base scores {theirs}"
        )
        texture = [finite(get(models, one, "fidelity", "texture_frechet")) for one in (name, "base")]
        if None not in texture:
            ours, theirs = map(number, texture)
            parts.append(f"its texture Fréchet distance to true images is {ours}, the base’s {theirs}")
        break
    if claims := report.get("claims") or []:
        parts.append(f"{sum(bool(claim.get('holds')) for claim in claims)} of {len(claims)} claims hold")
    if parts:
        return f"For the same prompts and seeds, {'; '.join(parts)}."
    return f"{len(models)} models." if models else "Nothing was compared in this run."


def _strip(report: Report, gallery: Gallery | None, home: Path) -> dict[str, Any]:
    """A row of pictures for each model, spread over the tags: the first image of each prompt, never a chosen one."""
    by_tag: dict[str, list[Mapping[str, Any]]] = {}
    for item in report.get("prompts") or []:
        if gallery is not None and (item.get("suite"), item.get("id")) in gallery.shots:
            by_tag.setdefault(f"{item['suite']} {item.get('tag', '')}", []).append(item)
    rounds = range(max(map(len, by_tag.values()), default=0))
    chosen = [group[turn] for turn in rounds for group in by_tag.values() if turn < len(group)][:STRIP]
    if gallery is None or not chosen:
        return {}
    shots = [gallery.shots[item["suite"], item["id"]] for item in chosen]
    rows = {
        name: [
            {"uri": data_uri(thumbnail(shot[name][0], SIDE))} | _file(shot[name][0], home) if shot.get(name) else {}
            for shot in shots
        ]
        for name in model_names(report)
        if any(shot.get(name) for shot in shots)
    }
    return {"prompts": [str(item.get("prompt", "")) for item in chosen], "rows": rows} if rows else {}


def _spectrum(basis: Mapping[str, Any]) -> Any:
    points = [(float(index + 1), float(value)) for index, value in enumerate(basis.get("spectrum") or [])]
    rank = finite(basis.get("rank"))
    mark = (rank, f"rank {number(rank)}") if rank is not None else None
    return line_chart([Line("energy", points)], "Energy of each direction (log scale)", "direction, strongest first",
                      y_log=True, mark=mark)  # fmt: skip


def _curves(training: Mapping[str, Any]) -> list[Any]:
    rows = training.get("curve") or []
    charts = []
    for column, title in ((1, "Loss"), (2, "λ: share of the base’s own latent error taken out of the target, mean")):
        kept = [row for row in rows if len(row) > column and finite(row[column]) is not None]
        points = [(float(row[0]), float(row[column])) for row in kept]
        charts.append(line_chart([Line(title, points)], title, "step"))
    return [chart for chart in charts if chart]


def _decided(report: Report) -> dict[str, list[tuple[str, Any]]]:
    """What decided each model's scores: digests, sampler, seed, protocols, what is missing."""
    found = {}
    for name in model_names(report):
        model = get(report, "models", name)
        pairs = flat({key: model[key] for key in ("path", "digest") if key in model} | (model.get("generation") or {}))
        for suite, key in tables.KEYS.items():
            if get(model, key) is not None:
                pairs += flat(get(model, key, "protocol") or {}, f"{tables.LABELS[suite]}: ")
                pairs.append((f"{tables.LABELS[suite]}: missing images", len(get(model, key, "missing") or ())))
        if pairs:
            found[name] = pairs
    return found


def _filters(report: Report) -> dict[str, tuple[str, dict[str, str]]]:
    """The choices above the grid: ``{key: (label, {value: shown})}``."""
    items, names = report.get("prompts") or [], model_names(report)
    if not items:
        return {}
    suites = list(dict.fromkeys(str(item.get("suite", "")) for item in items))
    wins = {name: f"{tables.SHORT.get(name, name)} beats the rest" for name in names} if len(names) > 1 else {}
    wins["differ"] = "Models differ"
    if "geneval" in suites:
        wins |= {"all": "All right", "none": "All wrong"}
    tags = sorted({str(item["tag"]) for item in items if item.get("tag")})
    found = {
        "suite": ("Suite", {suite: tables.LABELS.get(suite, suite) for suite in suites}),
        "tag": ("Tag", {tag: tag.replace("_", " ") for tag in tags}),
        "won": ("Who won", wins),
    }
    if any("held_out" in item for item in items):
        found["held"] = ("Prompts", {"true": "Held out", "false": "Seen in training"})
    return found


Shown = list[tuple[int, list[Sequence[Sample]]]]


def _prompts(report: Report, gallery: Gallery | None, home: Path) -> tuple[list[dict[str, Any]], Shown]:
    """What the script reads of every prompt, and the images of those that have any: (number, a row a model)."""
    names, shots = model_names(report), gallery.shots if gallery else {}
    rows: list[dict[str, Any]] = []
    shown: Shown = []
    for item in report.get("prompts") or []:
        mine = shots.get((str(item.get("suite", "")), str(item.get("id", ""))), {})
        have = [name for name in names if mine.get(name)]
        if have:
            shown.append((len(rows), [mine[name] for name in have]))
        verdicts = item.get("verdicts") or {}
        cells = {name: _cells(verdicts.get(name) or [], mine.get(name) or [], home) for name in names}
        row = {key: item[key] for key in ("suite", "id", "prompt", "tag", "held_out") if key in item}
        rows.append(row | {"models": {name: found for name, found in cells.items() if found}, "sheet": have})
    return rows, shown


def _cells(verdicts: Sequence[Mapping[str, Any]], samples: Sequence[Sample], home: Path) -> list[dict[str, Any]]:
    found = []
    for index in range(max(len(verdicts), len(samples))):
        cell: dict[str, Any] = {}
        if index < len(verdicts):
            cell |= {key: verdicts[index][key] for key in ("correct", "score", "reason") if key in verdicts[index]}
        if index < len(samples):
            cell |= _file(samples[index], home)
        found.append(cell)
    return found


def _file(sample: Sample, home: Path) -> dict[str, Any]:
    """Where the original lies, as the page beside it reads it; ``part``: it holds more than this image."""
    place = Path(os.path.relpath(sample.path.resolve(), home.resolve())).as_posix()
    return {"file": place} | ({} if sample.box is None else {"part": True})


def _sheets(shown: Shown, gallery: Gallery | None) -> Iterator[tuple[int, Sheet, str]]:
    """Every prompt's number, its contact sheet and the sheet's bytes as text, drawn while the page is written."""
    if gallery is None or not shown:
        return
    side = side_for(sum(len(row) for _, rows in shown for row in rows))
    drawn = sheets([rows for _, rows in shown], side, gallery.digests, gallery.cache)
    for (place, _), one in zip(shown, drawn, strict=True):
        yield place, one, base64.b64encode(one.webp).decode("ascii")
