"""The report: one HTML file that holds everything it shows and asks nothing of a network.

It works with thousands of images a model because it loads none of them at once: every prompt's images are one small
contact sheet, kept in the page as text that the browser does not decode until its card comes near the view. The
originals lie in their folders; a click opens one.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

from flux2pixel.evaluate.report import tables as tables
from flux2pixel.evaluate.report.page import data_uri, facts, finite, line_chart, number, option, text
from flux2pixel.evaluate.report.sheets import SIDE, Sheet, sheets, side_for, thumbnail
from flux2pixel.evaluate.report.tables import Report, get, model_names, score_of, short_name
from flux2pixel.evaluate.store import Digests
from flux2pixel.evaluate.suite import Sample

STRIP = 12  # prompts in the row of pictures at the top

# A second lock on the promise that no request leaves the page; blob: is where a decoded sheet lives.
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Gallery:
    """The images that a report shows: ``shots[(suite, prompt id)][model]`` lists samples, ``cache`` keeps sheets."""

    shots: Mapping[tuple[str, str], Mapping[str, Sequence[Sample]]]
    cache: Path
    digests: Digests = field(default_factory=lambda: Digests(Path(os.devnull)))


def write_report(report: Report, gallery: Gallery | None, path: Path) -> None:
    """Write ``report`` as one self-contained HTML file at ``path``, whole or not at all.

    Any part of ``report`` may be missing; its section is then left out. The page is streamed, so that memory does not
    grow with the number of images. Raises OSError if the file cannot be written.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            _write(report, gallery, path, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write(report: Report, gallery: Gallery | None, path: Path, stream: TextIO) -> None:
    style, script = (
        files("flux2pixel.evaluate.report").joinpath(name).read_text("utf-8") for name in ("report.css", "report.js")
    )
    title = f"{report.get('base', 'A latent base')}, from latents to pixels"
    stream.write(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>\n{style}</style></head>\n<body>\n"
        f'<h1>{text(title)}</h1><p class="verdict">{_verdict(report)}</p>\n'
    )
    sections = (
        tables.summary(report), _strip(report, gallery), _claims(report), tables.comparable(report), _basis(report),
        _training(report), _exactness(report), _prompts(report), tables.provenance(report), _settings(report),
    )  # fmt: skip
    stream.writelines(section + "\n" for section in sections if section)
    for part in _data(report, gallery, path.parent):
        stream.write(part)
    stream.write(f"<script>\n{script}</script>\n</body></html>\n")


def _verdict(report: Report) -> str:
    models = report.get("models") or {}
    parts = []
    for key, better in (("finetuned", "finetuned pixel model"), ("converted", "converted pixel model")):
        ours, theirs = (get(models, name, "geneval", "overall", "score") for name in (key, "base"))
        if finite(ours) is not None and finite(theirs) is not None:
            parts.append(
                f"the {better} scores {score_of(ours)} on GenEval where its latent base scores {score_of(theirs)}"
            )
            ours, theirs = (get(models, name, "fidelity", "texture_frechet") for name in (key, "base"))
            if finite(ours) is not None and finite(theirs) is not None:
                parts.append(
                    f"its texture Fréchet distance to true renders is {number(ours)}, the base's {number(theirs)}"
                )
            break
    claims = report.get("claims") or []
    if claims:
        held = sum(bool(claim.get("holds")) for claim in claims)
        parts.append(f"{held} of {len(claims)} claims hold")
    if parts:
        return f"For the same prompts and seeds, {'; '.join(parts)}."
    return f"{len(models)} models." if models else "Nothing was compared in this run."


def _strip(report: Report, gallery: Gallery | None) -> str:
    """A row of pictures for each model, spread over the tags: the first image of each prompt, never a chosen one."""
    if gallery is None:
        return ""
    by_tag: dict[str, list[Mapping[str, Any]]] = {}
    for item in report.get("prompts") or []:
        if (item.get("suite"), item.get("id")) in gallery.shots:
            by_tag.setdefault(f"{item['suite']} {item.get('tag', '')}", []).append(item)
    rounds = range(max(map(len, by_tag.values()), default=0))
    chosen = [group[turn] for turn in rounds for group in by_tag.values() if turn < len(group)][:STRIP]
    shots = [gallery.shots[item["suite"], item["id"]] for item in chosen]
    cells = ""
    for name in model_names(report):
        if not any(shot.get(name) for shot in shots):
            continue
        cells += f'<div class="name {text(name)}">{text(short_name(name))}</div>'
        for item, shot in zip(chosen, shots, strict=True):
            if not shot.get(name):
                cells += "<div></div>"
                continue
            words = text(item.get("prompt", ""))
            cells += f'<img alt="{words}" title="{words}" src="{data_uri(thumbnail(shot[name][0], SIDE))}">'
    if not cells:
        return ""
    cells += "<div></div>" + "".join(
        f'<div class="caption">{text(str(item.get("prompt", ""))[:120])}</div>' for item in chosen
    )
    columns = f"grid-template-columns: 84px repeat({len(chosen)}, 1fr)"
    return (
        f'<h2>The same prompts and seeds</h2><div class="wide"><div class="strip" style="{columns}">{cells}</div></div>'
    )


def _claims(report: Report) -> str:
    items = "".join(
        f"<li>{'<b class=holds>Holds</b>' if claim.get('holds') else '<b class=fails>Does not</b>'}"
        f"<div>{text(claim.get('claim', ''))}<span>{text(claim.get('figures', ''))}</span></div></li>"
        for claim in report.get("claims") or []
    )
    return f'<h2>What the paper claims, in miniature</h2><ul class="claims">{items}</ul>' if items else ""


def _basis(report: Report) -> str:
    basis = report.get("basis")
    if not basis:
        return ""
    vectors = [uri for uri in basis.get("vectors") or [] if isinstance(uri, str) and uri.startswith("data:image/")]
    shown = "".join(f'<img alt="basis vector {index}" src="{text(uri)}">' for index, uri in enumerate(vectors))
    spectrum = [(float(index + 1), float(value)) for index, value in enumerate(basis.get("spectrum") or [])]
    rank = finite(basis.get("rank"))
    chart = line_chart(
        spectrum, "Spectrum (log scale)", "component", log=True, mark=rank, mark_label=f"rank {number(rank)}"
    )
    labels = {
        "method": "Method", "rank": "Rank", "patch_dim": "Patch dimension", "scale": "Scale",
        "captured_energy": "Captured energy", "alignment_residual": "Alignment residual",
        "orthonormality_error": "Orthonormality error", "half_split_angle_deg": "Angle between halves (degrees)",
    }  # fmt: skip
    listed = facts([(label, basis.get(key)) for key, label in labels.items()])
    pictures = (
        f'<p class="note">Its vectors as patches of pixels</p><div class="vectors">{shown}</div>' if shown else ""
    )
    return f'<h2>The basis</h2><div class="pair"><div>{pictures}{listed}</div><div>{chart}</div></div>'


def _training(report: Report) -> str:
    training = report.get("training") or {}
    rows = training.get("curve") or []
    charts = ""
    readers: list[tuple[int, str]] = [(1, "Loss"), (2, "λ")]
    for column, title in readers:
        points = [
            (float(row[0]), float(row[column])) for row in rows if len(row) > column and finite(row[column]) is not None
        ]
        charts += line_chart(points, title, "step")
    listed = facts([("Images seen", training.get("images_seen"))])
    return f'<h2>Training</h2><div class="pair">{charts}</div>{listed}' if charts or listed else ""


def _exactness(report: Report) -> str:
    exact = report.get("exactness") or {}
    labels = (("max_abs_error", "Largest absolute error"), ("steps", "Steps"), ("dtype", "Arithmetic"))
    listed = facts([(label, exact.get(key)) for key, label in labels])
    return (
        f'<h2>Exactness</h2><p class="note">Converted against latent base, coupled noise.</p>{listed}' if listed else ""
    )


def _prompts(report: Report) -> str:
    """The filters and the empty grid; the script fills it from the data below."""
    items = report.get("prompts") or []
    if not items:
        return ""
    names = model_names(report)
    suites = list(dict.fromkeys(str(item.get("suite", "")) for item in items))
    wins = {name: f"{short_name(name)} beats the rest" for name in names} if len(names) > 1 else {}
    wins |= {"differ": "Models differ"}
    if "geneval" in suites:
        wins |= {"all": "All right", "none": "All wrong"}
    tags = sorted({str(item["tag"]) for item in items if item.get("tag")})
    choices = {
        "suite": ("Suite", {suite: tables.LABELS.get(suite, suite) for suite in suites}),
        "tag": ("Tag", {tag: tag.replace("_", " ") for tag in tags}),
        "won": ("Who won", wins),
        "held": ("Prompts", {"true": "Held out", "false": "Seen in training"}),
    }
    if not any("held_out" in item for item in items):
        del choices["held"]
    filters = "".join(
        f'<label>{label} <select id="filter-{key}">{option("", "any")}'
        f"{''.join(option(value, shown) for value, shown in values.items())}</select></label>"
        for key, (label, values) in choices.items()
    )
    filters += '<label>Words <input id="filter-words" type="search"></label>'
    filters += '<span class="note" id="shown" role="status"></span>'
    return (
        '<h2>Every prompt</h2><p class="note">Solid green foot: right; double red: wrong; grey: a score or none. '
        "Hover for the reason, click for the original.</p>"
        f'<div class="filters">{filters}</div><div id="grid"></div>'
    )


def _data(report: Report, gallery: Gallery | None, home: Path) -> Iterator[str]:
    """What the script reads: the prompts with their verdicts as JSON, and every sheet as text in its own element."""
    items = report.get("prompts") or []
    if not items:
        return
    names = model_names(report)
    shots = gallery.shots if gallery else {}
    rows = []
    shown: list[tuple[int, list[Sequence[Sample]]]] = []
    for number_, item in enumerate(items):
        mine = shots.get((str(item.get("suite", "")), str(item.get("id", ""))), {})
        have = [name for name in names if mine.get(name)]
        if have:
            shown.append((number_, [mine[name] for name in have]))
        verdicts = item.get("verdicts") or {}
        cells = {name: _cells(verdicts.get(name) or [], mine.get(name) or [], home) for name in names}
        row = {key: item[key] for key in ("suite", "id", "prompt", "tag", "held_out") if key in item}
        rows.append(row | {"models": {name: found for name, found in cells.items() if found}, "sheet": have})
    content = {"names": {name: short_name(name) for name in names}, "prompts": rows}
    yield f'<script type="application/json" id="data">{_inert(content)}</script>\n'
    if gallery is None or not shown:
        return
    side = side_for(sum(len(row) for _, rows_ in shown for row in rows_))
    drawn = sheets([rows_ for _, rows_ in shown], side, gallery.digests, gallery.cache)
    for (number_, _), one in zip(shown, drawn, strict=True):
        yield _sheet(number_, one)


def _cells(verdicts: Sequence[Mapping[str, Any]], samples: Sequence[Sample], home: Path) -> list[dict[str, Any]]:
    found = []
    for index in range(max(len(verdicts), len(samples))):
        cell: dict[str, Any] = {}
        if index < len(verdicts):
            cell |= {key: verdicts[index][key] for key in ("correct", "score", "reason") if key in verdicts[index]}
        if index < len(samples):
            cell["file"] = Path(os.path.relpath(samples[index].path, home)).as_posix()
        found.append(cell)
    return found


def _sheet(number_: int, one: Sheet) -> str:
    content = base64.b64encode(one.webp).decode("ascii")
    return (
        f'<script type="text/plain" id="sheet-{number_}" data-rows="{one.rows}" data-columns="{one.columns}">'
        f"{content}</script>\n"
    )


def _inert(value: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _settings(report: Report) -> str:
    groups = {"Seconds": report.get("seconds"), "Settings": report.get("settings"), "Versions": report.get("versions")}
    return "".join(
        f"<h2>{title}</h2>{listed}"
        for title, rows in groups.items()
        if (listed := facts([(str(key).replace("_", " "), value) for key, value in (rows or {}).items()]))
    )
