"""The one file that travels with a model: a pipeline's source with the method's modules put into it.

A folder's code must run where flux2pixel is not installed, and diffusers fetches files that import each other only one
level deep. So the copy is a single file, built from the package's own source when it is written, and named by release:
folders of different releases can be loaded side by side.
"""

from __future__ import annotations

import ast
from pathlib import Path

from flux2pixel.runtime import files
from flux2pixel.runtime.version import __version__

PACKAGE = "flux2pixel.asymflow"
CARRIED = (
    "color",
    "tokens",
    "codec",
    "method",
    "guidance",
    "schedule",
    "solvers",
    "denoiser",
    "readout",
)  # each after what it uses
CODE = f"asymflow_pipeline_{__version__.replace('.', '_')}"
PIPELINE_CLASS = [CODE, "AsymFlowPipeline"]  # as model_index.json names it


def bundle(pipeline: Path) -> str:
    """The source of a pipeline's module with the method's modules in the place of their imports."""
    source = pipeline.read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if _of_package(node)]
    lines = source.splitlines()
    first, last = imports[0].lineno - 1, imports[-1].end_lineno
    carried = [f"# {PACKAGE}.{name}\n\n{_body(_module(name))}" for name in CARRIED]
    return "\n".join(lines[:first]) + "\n\n".join(["", *carried, ""]) + "\n".join(lines[last:]) + "\n"


def copy_code(folder: Path, pipeline: Path) -> None:
    """Write the travelling copy of the pipeline's module into ``folder``."""
    text = bundle(pipeline)
    files.write(folder / f"{CODE}.py", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _module(name: str) -> str:
    return (Path(__file__).parents[1] / "asymflow" / f"{name}.py").read_text(encoding="utf-8")


def _body(source: str) -> str:
    """A module's source without its docstring, its future imports and its imports of the package."""
    left_out: set[int] = set()
    for place, node in enumerate(ast.parse(source).body):
        docstring = place == 0 and isinstance(node, ast.Expr)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if docstring or future or _of_package(node):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = [line for number, line in enumerate(source.splitlines(), 1) if number not in left_out]
    return "\n".join(kept).strip()


def _of_package(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flux2pixel")
