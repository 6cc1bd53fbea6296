"""The report: one HTML file that holds everything it shows (style, script, pictures) and asks nothing of a network."""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from flux2pixel.evaluate.report_page import (
    closest,
    facts,
    finite,
    interval_bar,
    interval_cell,
    line_chart,
    number,
    option,
    picture,
    score,
    table_row,
    text,
)

Report = Mapping[str, Any]
Pictures = Mapping[str, Mapping[str, list[np.ndarray]]]

NAMES = {"base": "Latent base", "converted": "Converted, not finetuned", "finetuned": "Finetuned"}
SHORT = {"base": "Latent base", "converted": "Converted", "finetuned": "Finetuned"}
STRIP = 12

# What each fidelity measure is called, and what is best: the value itself (None: that of the true renders).
MEASURES: dict[str, tuple[str, float | None]] = {
    "texture_frechet": ("Texture Fréchet distance", 0.0),
    "patch_frechet": ("Patch Fréchet distance", 0.0),
    "spectrum_all": ("Spectrum error (decades)", 0.0),
    "spectrum_high": ("High band (decades; < 0: blur)", 0.0),
    "blockiness": ("Blockiness (as true renders)", None),
    "grain": ("Grain (as true renders)", None),
    "colour_mean_error": ("Colour mean error", 0.0),
    "colour_std_error": ("Colour spread error", 0.0),
}

# A second lock on the promise that no request leaves the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(report: Report, images: Pictures, path: Path) -> None:
    """Write ``report`` as one self-contained HTML file at ``path``, whole or not at all.

    ``images[prompt][model]`` lists up to four ``(H, W, 3)`` uint8 arrays. Any part of ``report`` may be missing; its
    section is then left out. Raises OSError if the file cannot be written.
    """
    page = render_report(report, images)
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(page)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def render_report(report: Report, images: Pictures) -> str:
    """The page of :func:`write_report` as a string."""
    style, script = (
        files("flux2pixel.evaluate").joinpath(name).read_text("utf-8") for name in ("report.css", "report.js")
    )
    title = f"{report.get('base', 'A latent base')}, from latents to pixels"
    sections = [
        f'<h1>{text(title)}</h1><p class="verdict">{_verdict(report)}</p>',
        _summary(report),
        _strip(report, images),
        _claims(report),
        _basis(report),
        _training(report),
        _exactness(report),
        _prompts(report, images),
        _settings(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>\n{style}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<script>\n{script}</script>\n</body></html>\n"
    )


def _models(report: Report) -> list[str]:
    found = report.get("models") or {}
    return [name for name in NAMES if name in found] + [name for name in found if name not in NAMES]


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _verdict(report: Report) -> str:
    models = report.get("models") or {}
    parts = []
    for key, better in (("finetuned", "finetuned pixel model"), ("converted", "converted pixel model")):
        ours, theirs = (
            _get(models, key, "geneval", "overall", "score"),
            _get(models, "base", "geneval", "overall", "score"),
        )
        if finite(ours) is not None and finite(theirs) is not None:
            parts.append(f"the {better} scores {score(ours)} on GenEval where its latent base scores {score(theirs)}")
            ours, theirs = (_get(models, name, "fidelity", "texture_frechet") for name in (key, "base"))
            if finite(ours) is not None and finite(theirs) is not None:
                parts.append(
                    f"its texture Fréchet distance to true renders is {number(ours)}, the base's {number(theirs)}"
                )
            break
    claims = report.get("claims") or []
    if claims:
        held = sum(bool(claim.get("holds")) for claim in claims)
        parts.append(f"{held} of {len(claims)} claims hold")
    sentence = "; ".join(parts) or "Nothing was compared in this run"
    return f"For the same prompts and seeds, {sentence}." if parts else f"{sentence}."


def _summary(report: Report) -> str:
    names = _models(report)
    if not names:
        return ""
    models = report["models"]
    vae, real = (_get(report, "fidelity_ceiling", key) or {} for key in ("vae", "real"))
    rows = [_overall_row(report, names)]
    tags = list(dict.fromkeys(tag for name in names for tag in _get(models[name], "geneval", "tags") or {}))
    for tag in tags:
        cells = [_get(models[name], "geneval", "tags", tag) or {} for name in names]
        shown = [interval_cell(cell) for cell in cells]
        ceiling = next((found for name in names if (found := _ceiling(models[name], tag)) is not None), None)
        rows.append(table_row(tag.replace("_", " "), shown, [], ["", score(ceiling)]))
    rows.append(f'<tr class="group"><th colspan="{len(names) + 3}">Fidelity to true renders</th></tr>')
    known = list(dict.fromkeys(key for name in names for key in models[name].get("fidelity") or {}))
    for key in [key for key in MEASURES if key in known] + [key for key in known if key not in MEASURES]:
        values = [_get(models[name], "fidelity", key) for name in names]
        label, goal = MEASURES.get(key, (key.replace("_", " "), None))
        target = finite(real.get(key)) if goal is None else goal
        best = closest(values, target) if key in MEASURES else []
        rows.append(
            table_row(label, [number(value) for value in values], best, [number(vae.get(key)), number(real.get(key))])
        )
    rows.append(f'<tr class="group"><th colspan="{len(names) + 3}">Cost</th></tr>')
    for key, label in (("steps", "Sampling steps"), ("seconds_per_image", "Seconds per image")):
        rows.append(table_row(label, [number(models[name].get(key)) for name in names], [], ["", ""]))
    head = "".join(
        f'<th class="{text(name)}"><span class="name">{text(NAMES.get(name, name))}</span></th>' for name in names
    )
    head += "<th>VAE alone<small>reconstructions</small></th><th>True renders<small>against others</small></th>"
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="note">Ranges are 95 % bootstrap intervals over prompts; the dashed tick is the detector on true '
        "renders. Bold is the closest to the best value.</p>"
    )


def _overall_row(report: Report, names: list[str]) -> str:
    ceiling = finite(report.get("detector_ceiling"))
    cells = ""
    for name in names:
        cell = _get(report["models"][name], "geneval", "overall") or {}
        top = ceiling if ceiling is not None else _ceiling(report["models"][name], None)
        bar = interval_bar(cell.get("score"), cell.get("low"), cell.get("high"), text(name), top)
        cells += f"<td>{interval_cell(cell)}{bar}{_paired(report, name)}</td>"
    return f'<tr class="overall"><th>GenEval, overall</th>{cells}<td></td><td>{score(ceiling)}</td></tr>'


def _paired(report: Report, name: str) -> str:
    pair = _get(report, "paired", f"{name}-base")
    if not pair:
        return "<small>&nbsp;</small>"
    shown, low, high = (score(pair.get(key)) for key in ("difference", "low", "high"))
    return f"<small>vs base {shown} [{low}, {high}]</small>"


def _ceiling(model: Mapping[str, Any], tag: str | None) -> float | None:
    found = _get(model, "geneval", "ceiling")
    if isinstance(found, Mapping):
        found = found.get(tag) if tag else found.get("overall")
        return finite(found.get("score") if isinstance(found, Mapping) else found)
    return finite(found) if tag is None else None


def _strip(report: Report, images: Pictures) -> str:
    """A row of pictures for each model, spread over the tags: the first image of each prompt, never a chosen one."""
    tag_of = {item.get("prompt"): item.get("tag", "") for item in report.get("prompts") or []}
    by_tag: dict[str, list[str]] = {}
    for prompt in images:
        by_tag.setdefault(tag_of.get(prompt, ""), []).append(prompt)
    rounds = range(max((len(group) for group in by_tag.values()), default=0))
    chosen = [group[turn] for turn in rounds for group in by_tag.values() if turn < len(group)][:STRIP]
    names = [name for name in _image_models(report, images) if any(images[prompt].get(name) for prompt in chosen)]
    if not names:
        return ""
    cells = ""
    for name in names:
        cells += f'<div class="name {text(name)}">{text(SHORT.get(name, name))}</div>'
        for prompt in chosen:
            shots = images[prompt].get(name) or []
            cells += (
                f'<img alt="{text(prompt)}" title="{text(prompt)}" src="{picture(shots[0])}">'
                if len(shots)
                else "<div></div>"
            )
    cells += "<div></div>" + "".join(f'<div class="caption">{text(prompt)}</div>' for prompt in chosen)
    columns = f"grid-template-columns: 84px repeat({len(chosen)}, 1fr)"
    return (
        f'<h2>The same prompts and seeds</h2><div class="wide"><div class="strip" style="{columns}">{cells}</div></div>'
    )


def _image_models(report: Report, images: Pictures) -> list[str]:
    found = dict.fromkeys(_models(report)) | dict.fromkeys(name for shots in images.values() for name in shots)
    return [name for name in NAMES if name in found] + [name for name in found if name not in NAMES]


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


def _prompts(report: Report, images: Pictures) -> str:
    listed = {item["prompt"]: item for item in report.get("prompts") or [] if "prompt" in item}
    items = [listed.get(prompt, {"prompt": prompt}) for prompt in dict.fromkeys([*listed, *images])]
    names = _image_models(report, images)
    if not items:
        return ""
    tags = sorted({str(item["tag"]) for item in items if item.get("tag")})
    wins = {name: f"{SHORT.get(name, name)} beats the rest" for name in names} if len(names) > 1 else {}
    wins |= {"differ": "Models differ", "all": "All right", "none": "All wrong"}
    choices = {
        "tag": ("Tag", {tag: tag.replace("_", " ") for tag in tags}),
        "won": ("Who won", wins),
        "held": ("Prompts", {"true": "Held out", "false": "Seen in training"}),
    }
    filters = "".join(
        f'<label>{label} <select id="filter-{key}">{option("", "any")}'
        f"{''.join(option(value, shown) for value, shown in values.items())}</select></label>"
        for key, (label, values) in choices.items()
    )
    filters += '<label>Words <input id="filter-words" type="search"></label>'
    filters += '<span class="note" id="shown" role="status"></span>'
    cards = "".join(_card(item, images.get(item["prompt"], {}), names) for item in items)
    return (
        '<h2>Every prompt</h2><p class="note">Solid green foot: right; double red: wrong. Hover for the reason.</p>'
        f'<div class="filters">{filters}</div><div id="grid">{cards}</div>'
    )


def _card(item: Mapping[str, Any], shots: Mapping[str, list[np.ndarray]], names: list[str]) -> str:
    shares: dict[str, float] = {}
    rows = ""
    for name in names:
        verdicts = _get(item, "verdicts", name) or []
        if verdicts:
            shares[name] = sum(bool(verdict.get("correct")) for verdict in verdicts) / len(verdicts)
        cells = ""
        for index, pixels in enumerate((shots.get(name) or [])[:4]):
            verdict = verdicts[index] if index < len(verdicts) else {}
            state = {True: "right", False: "wrong", None: "unjudged"}[verdict.get("correct")]
            reason = text(f"{state}: {verdict['reason']}" if verdict.get("reason") else state)
            shot = f'<img alt="{reason}" src="{picture(pixels)}"><span>{reason}</span>'
            cells += f'<div class="shot {state}" tabindex="0">{shot}</div>'
        if cells:
            rows += f'<div class="row"><div class="name {text(name)}">{text(SHORT.get(name, name))}</div>{cells}</div>'
    prompt, tag, held = str(item["prompt"]), str(item.get("tag", "")), bool(item.get("held_out"))
    note = ", ".join(part for part in (tag.replace("_", " "), "held out" if held else "") if part)
    return (
        f'<article class="card" data-tag="{text(tag)}" data-held="{str(held).lower()}" '
        f'data-prompt="{text(prompt.lower())}" data-shares="{text(json.dumps(shares))}">'
        f'<h3>{text(prompt)}</h3><div class="note">{text(note)}</div>{rows}</article>'
    )


def _settings(report: Report) -> str:
    paths = {SHORT.get(name, name): report["models"][name].get("path") for name in _models(report)}
    groups = {
        "Seconds": report.get("seconds"), "Settings": report.get("settings"),
        "Versions": report.get("versions"), "Models": paths,
    }  # fmt: skip
    return "".join(
        f"<h2>{title}</h2>{listed}"
        for title, rows in groups.items()
        if (listed := facts([(str(key).replace("_", " "), value) for key, value in (rows or {}).items()]))
    )
