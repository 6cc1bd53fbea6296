"""Plug-ins: what a base brings beside its weights is found by entry point, and nothing asks for one by name."""

import re
from pathlib import Path

import flux2pixel
from flux2pixel.evaluate.store import Digests, Memo
from flux2pixel.evaluate.suites import has_truth, open_suites
from flux2pixel.families import registry
from flux2pixel.recipe import load

ROOT = Path(flux2pixel.__file__).parent


def test_evaluate_neither_names_nor_imports_the_miniature():
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "evaluate").rglob("*.py")
        if path.parts[-2] not in ("fidelity", "report")
        for line in path.read_text().splitlines()
        if re.search(r"klein-tiny|miniature", line)
    ]
    assert not found


def test_the_miniature_imports_nothing_of_evaluate():
    for path in (ROOT / "miniature").glob("*.py"):
        assert "flux2pixel.evaluate" not in path.read_text(), path


def test_a_base_is_judged_by_the_suites_that_it_brings(tmp_path):
    def suites(*settings):
        recipe = load(None, list(settings))
        return open_suites(recipe, Digests(tmp_path / "d"), Memo(tmp_path / "m"), "cpu")

    for suite in suites("eval.suite=['geneval', 'dpg-bench']"):
        assert suite.decided_by["judge"] == "miniature"
        assert {suite.size_of(prompt) for prompt in suite.prompts} == {(32, 32)}
        assert suite.held_out
    assert has_truth(load(None))
    assert (
        registry.plugin("flux2-klein-9b") is None and registry.plugin(str(registry.plugin("klein-tiny").folder)) is None
    )
    (official,) = suites("base='flux2-klein-9b'", "eval.suite=['fidelity']", "eval.reference='scenes'")
    assert len(official.prompts) == 553 and official.size_of(official.prompts[0]) == (1024, 1024)
    assert official.held_out is None and not has_truth(load(None, ["base='flux2-klein-9b'"]))
