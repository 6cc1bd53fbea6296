"""Check the figures (not the times) of a run of the main command: ``python .ci/check_report.py report.json``."""

import json
import sys
from pathlib import Path

STAGES = ("fit_subspace", "convert", "fit_readout", "finetune", "eval")
report = json.loads(Path(sys.argv[1]).read_text())
models = report["models"]
score = {name: models[name]["geneval"]["overall"]["score"] for name in ("base", "converted", "readout", "finetuned")}
checks = {
    "conversion is exact": report["exactness"]["max_abs_error"] < 1e-9,
    "the detector sees true renders": report["detector_ceiling"] >= 0.97,
    "the base means something": score["base"] >= 0.6,
    "the readout is ahead of the base in texture": (
        models["readout"]["fidelity"]["texture_frechet"] < models["base"]["fidelity"]["texture_frechet"]
    ),
    "the readout is ahead of the conversion": score["readout"] > score["converted"],
    "every tag is scored": all(len(m["geneval"]["tags"]) == 6 for m in models.values()),
    "480 images a model": all(sum(t["images"] for t in m["geneval"]["tags"].values()) == 480 for m in models.values()),
    "the stages were timed": all(report["seconds"][s] > 0 for s in STAGES),
}
for name, holds in checks.items():
    print("ok  " if holds else "FAIL", name)
sys.exit(not all(checks.values()))
