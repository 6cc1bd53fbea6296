"""The house itself: imports point down, one denoiser, and documents that say each thing once."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flux2pixel"


def test_imports_point_down_and_no_verb_imports_another():
    """The contracts of pyproject, import-linter's: a circle or an upward import fails."""
    words = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


def test_there_is_one_denoiser():
    """Calibrate, call, recover is written once: whoever recovers x0_hat elsewhere is a second denoiser."""
    at = {}
    for path in PACKAGE.rglob("*.py"):
        calls = [
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            if isinstance(node.func, ast.Attribute)
        ]
        if "predict_x0" in calls:
            at[path.relative_to(PACKAGE).as_posix()] = calls.count("predict_x0")
    assert set(at) == {"asymflow/denoiser.py", "asymflow/method.py"}, at


def test_there_is_one_sampling_loop():
    loops = [
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "scheduler.step(" in path.read_text()
    ]
    assert loops == ["asymflow/solvers.py"]


def test_the_miniature_is_not_named_outside_its_room():
    for path in PACKAGE.rglob("*.py"):
        if "miniature" not in path.relative_to(PACKAGE).parts:
            text = path.read_text()
            if path == PACKAGE / "__init__.py":  # its docstring shows the bundled base to a newcomer
                text = text.replace(ast.get_docstring(ast.parse(text), clean=False) or "", "")
            assert "klein-tiny" not in text and "flux2pixel.miniature" not in text, path


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_a_document_says_each_thing_once_and_its_links_lead_somewhere(path):
    text = path.read_text()
    headings = Counter(re.findall(r"^#{1,4} .*$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M))
    assert [line for line, count in headings.items() if count > 1] == []
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
