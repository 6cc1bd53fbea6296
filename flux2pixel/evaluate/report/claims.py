"""What the method claims: each claim with the figures that came out, good or bad."""

from __future__ import annotations

from typing import Any

BETTER = {
    "readout": "The readout beats the base's fidelity at no loss of GenEval, without training",
    "finetuned": "Finetuning beats the base's fidelity at no loss of GenEval",
}


def claims(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge the claims from a report; those whose figures are missing are left out."""
    stated = []
    models = report["models"]
    paired = {pair: found["geneval"] for pair, found in report.get("paired", {}).items() if "geneval" in found}
    if "exactness" in report:
        error = report["exactness"]["max_abs_error"]
        stated.append(
            {
                "claim": "Conversion is exact",
                "holds": error < 1e-9,
                "figures": f"largest error {error:.1e} over {report['exactness']['steps']} coupled steps in float64",
            }
        )
    if "converted-base" in paired:
        gap = paired["converted-base"]
        stated.append(
            {
                "claim": "The converted model keeps the base's semantics",
                "holds": gap["low"] <= 0 <= gap["high"],
                "figures": f"GenEval difference to the base {_signed(gap)}",
            }
        )
    for name, claim in BETTER.items():
        if f"{name}-base" in paired and "fidelity" in models[name] and "fidelity" in models["base"]:
            gap = paired[f"{name}-base"]
            ours, base = models[name]["fidelity"], models["base"]["fidelity"]
            closer = ours["texture_frechet"] < base["texture_frechet"] and ours["patch_frechet"] < base["patch_frechet"]
            stated.append(
                {
                    "claim": claim,
                    "holds": closer and gap["high"] >= 0,
                    "figures": (
                        f"texture Fréchet {ours['texture_frechet']:.4f} against {base['texture_frechet']:.4f}, "
                        f"patch Fréchet {ours['patch_frechet']:.4f} against {base['patch_frechet']:.4f}, "
                        f"GenEval difference {_signed(gap)}"
                    ),
                }
            )
    return stated


def _signed(gap: dict[str, float]) -> str:
    return f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
