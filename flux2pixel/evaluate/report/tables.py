"""The report's tables: scores side by side with intervals and paired differences, what they may be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flux2pixel.evaluate.report.page import closest, facts, finite, interval_bar, number, table_row, text

Report = Mapping[str, Any]

NAMES = {"base": "Latent base", "converted": "Converted, not finetuned", "finetuned": "Finetuned"}
SHORT = {"base": "Latent base", "converted": "Converted", "finetuned": "Finetuned"}
LABELS = {"geneval": "GenEval", "dpg-bench": "DPG-Bench", "hpsv3": "HPSv3", "fidelity": "Fidelity"}
KEYS = {"geneval": "geneval", "dpg-bench": "dpg_bench", "hpsv3": "hpsv3"}  # of a suite in report.json
TOPS = {"geneval": 1.0, "dpg-bench": 100.0}  # scales with an end; HPSv3's has none

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
    "fid": ("FID, patch features", 0.0),
    "kid": ("KID, patch features", 0.0),
    "precision": ("Precision (in the true set’s manifold)", 1.0),
    "recall": ("Recall (of the true set)", 1.0),
    "inception_fid": ("FID", 0.0),
    "patch_fid": ("Patch-FID, crops", 0.0),
    "inception_kid": ("KID", 0.0),
    "inception_precision": ("Precision, Inception", 1.0),
    "inception_recall": ("Recall, Inception", 1.0),
    "clip_score": ("CLIP score", 100.0),
    "lpips_reconstruction": ("LPIPS of the reconstruction", 0.0),
}

LEFT = {
    "lpips_to_first": "LPIPS to the first model",
    "psnr_to_first": "PSNR to the first model (dB)",
    "psnr_reconstruction": "PSNR of the reconstruction (dB)",
}


def get(tree: Any, *keys: str) -> Any:
    """Follow keys through nested mappings; None where one is missing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def model_names(report: Report) -> list[str]:
    """The models of a report, a run's own first, in the order of its stages."""
    found = report.get("models") or {}
    return [name for name in NAMES if name in found] + [name for name in found if name not in NAMES]


def short_name(name: str) -> str:
    """What a model is called where there is little room."""
    return SHORT.get(name, name)


def score_of(value: Any, top: float | None = 1.0) -> str:
    """A score with as many decimals as its scale deserves, so that columns line up."""
    found = finite(value)
    return "–" if found is None else f"{found:.{3 if top == 1.0 else 2}f}".replace("-", "−")


def summary(report: Report) -> str:
    """Every suite's scores and the fidelity measures, one column a model."""
    names = model_names(report)
    if not names:
        return ""
    rows = [row for suite in KEYS for row in _suite_rows(report, names, suite)]
    rows += _fidelity_rows(report, names)
    rows.append(f'<tr class="group"><th colspan="{len(names) + 3}">Cost</th></tr>')
    for key, label in (("steps", "Sampling steps"), ("seconds_per_image", "Seconds per image")):
        rows.append(table_row(label, [number(get(report, "models", name, key)) for name in names], [], ["", ""]))
    head = "".join(
        f'<th class="{text(name)}"><span class="name">{text(NAMES.get(name, name))}</span></th>' for name in names
    )
    head += "<th>VAE alone<small>reconstructions</small></th><th>True images<small>against others</small></th>"
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="note">Ranges are 95 % bootstrap intervals over prompts; a difference is paired by prompt; the '
        "dashed tick is the detector on true renders. Bold is the closest to the best value. "
        "A run without all of a suite’s images has no overall.</p>"
    )


def _suite_rows(report: Report, names: list[str], suite: str) -> list[str]:
    key, top = KEYS[suite], TOPS.get(suite)
    found = {name: get(report, "models", name, key) or {} for name in names}
    if not any(found.values()):
        return []
    ceiling = finite(report.get("detector_ceiling")) if suite == "geneval" else None
    cells = ""
    for name in names:
        cell = found[name].get("overall") or {}
        bar = ""
        if top is not None and cell:
            score, low, high = (_share(cell.get(part), top) for part in ("score", "low", "high"))
            bar = interval_bar((score, low, high), text(name), ceiling, _interval(cell, top))
        shown = _range(cell, top) if cell else "<small>partial: no overall</small>"
        cells += f"<td>{shown}{bar}{_paired(report, name, key, top)}</td>"
    rows = [
        f'<tr class="overall"><th>{LABELS[suite]}, overall</th>{cells}<td></td>'
        f"<td>{score_of(ceiling, top) if ceiling is not None else ''}</td></tr>"
    ]
    groups = list(dict.fromkeys(tag for name in names for tag in _groups(found[name])))
    for tag in groups:
        shown_cells = [_range(_groups(found[name]).get(tag) or {}, top) for name in names]
        rows.append(table_row(tag.replace("_", " "), shown_cells, [], ["", ""]))
    return rows


def _share(value: Any, top: float) -> float | None:
    found = finite(value)
    return None if found is None else found / top


def _groups(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = figures.get("tags") or figures.get("groups") or {}
    return found


def _interval(cell: Mapping[str, Any], top: float | None) -> str:
    low, high = (score_of(cell.get(key), top) for key in ("low", "high"))
    return f"{score_of(cell.get('score'), top)}, 95 % interval {low} to {high}"


def _range(cell: Mapping[str, Any], top: float | None) -> str:
    """``{"score", "low", "high"}`` as a score and its interval, or the score alone if the interval is missing."""
    if finite(cell.get("low")) is None or finite(cell.get("high")) is None:
        return score_of(cell.get("score"), top)
    low, high = score_of(cell["low"], top), score_of(cell["high"], top)
    return f'{score_of(cell.get("score"), top)} <small class="range">[{low}, {high}]</small>'


def _paired(report: Report, name: str, key: str, top: float | None) -> str:
    for pair, found in (report.get("paired") or {}).items():
        ours, _, theirs = pair.rpartition("-")
        if ours == name and isinstance(found, Mapping) and key in found:
            shown, low, high = (score_of(found[key].get(part), top) for part in ("difference", "low", "high"))
            return f"<small>vs {text(theirs)} {shown} [{low}, {high}]</small>"
    return "<small>&nbsp;</small>"


def _fidelity_rows(report: Report, names: list[str]) -> list[str]:
    vae, real = (get(report, "fidelity_ceiling", key) or {} for key in ("vae", "real"))
    values = {name: get(report, "models", name, "fidelity") or {} for name in names}
    known = list(dict.fromkeys(key for name in names for key in (*values[name], *(vae if values[name] else ()))))
    if not known:
        return []
    rows = [f'<tr class="group"><th colspan="{len(names) + 3}">Fidelity to true images</th></tr>']
    for key in [key for key in MEASURES if key in known] + [key for key in known if key not in MEASURES]:
        row = [values[name].get(key) for name in names]
        label, goal = MEASURES.get(key, (LEFT.get(key, key.replace("_", " ")), None))
        target = finite(real.get(key)) if goal is None else goal
        best = closest(row, target) if key in MEASURES else []
        ceilings = [number(vae.get(key)), number(real.get(key))]
        rows.append(table_row(label, [number(value) for value in row], best, ceilings))
    return rows


def comparable(report: Report) -> str:
    """Which published figures each suite's scores may be compared with, and why the others may not."""
    found = report.get("comparable") or {}
    parts = ""
    for suite, statement in found.items():
        reasons = "".join(f"<li>{text(reason)}</li>" for reason in statement.get("reasons") or [])
        published = statement.get("published") or []
        rows = "".join(
            table_row(str(row.get("model", "")), [number(row.get("score")), text(row.get("source", ""))], [], [])
            for row in published
        )
        shown = f"<table><tbody>{rows}</tbody></table>" if rows else ""
        parts += (
            f"<h3>{text(LABELS.get(suite, suite))}</h3><p>{text(statement.get('statement', ''))}</p>"
            f"<ul>{reasons}</ul>{shown}"
        )
    return f'<h2>What these scores may be compared with</h2><div class="comparable">{parts}</div>' if parts else ""


def provenance(report: Report) -> str:
    """What decided each score: protocol, digests, versions, size, steps, guidance, seeds, what is missing."""
    parts = ""
    for name in model_names(report):
        model = get(report, "models", name)
        rows: list[tuple[str, Any]] = [("path", model.get("path")), ("digest", model.get("digest"))]
        rows += list((model.get("generation") or {}).items())
        for suite, key in KEYS.items():
            for label, value in (get(model, key, "protocol") or {}).items():
                rows.append((f"{LABELS[suite]}: {label}", value))
            lost: Sequence[Any] = get(model, key, "missing") or ()
            if get(model, key) is not None:
                rows.append((f"{LABELS[suite]}: missing images", len(lost)))
        listed = facts([(str(label).replace("_", " "), value) for label, value in rows])
        if listed:
            parts += f'<h3 class="name {text(name)}">{text(short_name(name))}</h3>{listed}'
    truth = report.get("fidelity_reference") or {}
    if truth:
        rows = [(key.replace("_", " "), value) for key, value in truth.items()]
        parts += (
            f'<h3>Fidelity</h3>{facts(rows)}<p class="note">FID falls with the number of images and depends on the '
            "reference: compare it within this report, not with published figures.</p>"
        )
    return f"<h2>What decided the scores</h2>{parts}" if parts else ""
