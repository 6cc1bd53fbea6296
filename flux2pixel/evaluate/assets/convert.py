"""Official checkpoints into safetensors, once; nothing in them is executed."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux2pixel.evaluate.dpg_bench import judges
from flux2pixel.evaluate.geneval import checkpoint
from flux2pixel.evaluate.hpsv3 import inputs
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, first_line

HPSV3_PACKAGE = "hpsv3==1.0.0"


def read_pickle(path: Path) -> Any:
    """Load a PyTorch file, weights only; Flux2PixelError if it holds anything else or is damaged.

    Plain numbers of numpy, which training logs leave in a checkpoint's metadata, are allowed.
    """
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8"))]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a damaged pickle raises depends on the damage
        first = " ".join(str(error).split())[:200]
        raise Flux2PixelError(f"{path}: cannot be loaded as weights alone ({first}); take the official file") from error


def detector(source: Path, target: Path, facts: dict[str, str]) -> None:
    """OpenMMLab's Mask2Former into a folder of transformers' class, every key accounted for."""
    saved = read_pickle(source)
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise Flux2PixelError(f"{source}: has no state_dict; take the OpenMMLab checkpoint")
    checkpoint.save(saved["state_dict"], checkpoint.official_config(), target.parent, facts)


def clip(source: Path, target: Path, facts: dict[str, str]) -> None:
    """OpenAI's CLIP archive into float32 tensors under open_clip's names, which are the same.

    The file is a TorchScript archive: its tensors are read, its code is not called. Its digest was checked before.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # deprecated for export, not for reading
            state: dict[str, Tensor] = torch.jit.load(str(source), map_location="cpu").state_dict()
    except RuntimeError as error:
        raise Flux2PixelError(f"{source}: not OpenAI's CLIP archive ({first_line(error)})") from error
    sizes = ("input_resolution", "context_length", "vocab_size")
    tensors = {name: value.float().contiguous() for name, value in state.items() if name not in sizes}
    _save(tensors, target, facts)


def mplug(source: Path, target: Path, facts: dict[str, str]) -> None:
    """mPLUG's pytorch_model.bin without its momentum copies."""
    saved = read_pickle(source)
    if not isinstance(saved, dict):
        raise Flux2PixelError(f"{source}: holds no dictionary of weights; take the official file")
    _save(judges.convert(saved), target, facts)


def _save(tensors: dict[str, Tensor], target: Path, facts: dict[str, str]) -> None:
    whole = {name: value.clone() for name, value in tensors.items()}  # tied or mapped tensors share storage
    files.write(target, lambda path: save_file(whole, path, metadata={"format": "pt", **facts}))


def instruction(target: Path) -> None:
    """HPSv3's instruction out of its published package, found by its digest; the package is not installed or run."""
    if target.is_file():
        inputs.read_instruction(target)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", HPSV3_PACKAGE, "--no-deps", "--quiet", "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise Flux2PixelError(f"{HPSV3_PACKAGE}: pip cannot get it ({why}); put the instruction at {target}")
        text = find_instruction(wheels[0])
    files.write(target, lambda path: path.write_bytes(text.encode()))


def find_instruction(wheel: Path) -> str:
    """Look for the string whose digest is the instruction's in the sources of a wheel, without running them."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".py"):
                continue
            for node in ast.walk(ast.parse(archive.read(name))):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(text, str) and hashlib.sha256(text.encode()).hexdigest() == inputs.INSTRUCTION_SHA256:
                    return text
    raise Flux2PixelError(f"{wheel.name}: does not hold HPSv3's instruction; want {HPSV3_PACKAGE}")
