"""Where a suite's images lie: the folders that the official scorers read, for writing and for reading back.

geneval    <folder>/00000/samples/0000.png ... 0003.png, metadata.jsonl beside samples/
dpg-bench  <folder>/<item>.png, a 2 x 2 grid of four samples (read also: <item>/0.png ... 3.png)
hpsv3      <folder>/<category>/<prompt>.png, its prompt in the .txt of the same name
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flux2pixel.evaluate import png
from flux2pixel.evaluate.suite import Prompt, Sample, Size
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError

GRID = 2  # samples along a side of DPG-Bench's grid
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageFile:
    """One image file and the samples of one prompt in it: one, or a grid filled row by row."""

    path: Path
    prompt: Prompt
    indices: tuple[int, ...]

    def samples(self, size: Size) -> list[Sample]:
        """The samples, each (height, width) = ``size`` pixels."""
        if len(self.indices) == 1:
            return [Sample(self.prompt, self.indices[0], self.path)]
        height, width = size
        found = []
        for place, index in enumerate(self.indices):
            x, y = place % GRID * width, place // GRID * height
            found.append(Sample(self.prompt, index, self.path, (x, y, x + width, y + height)))
        return found


def image_files(suite: str, folder: Path, prompts: Sequence[Prompt], samples: int) -> list[ImageFile]:
    """The files of a suite in its official layout, prompt by prompt; at most ``samples`` images a prompt."""
    found = []
    for prompt in prompts:
        count = min(samples, prompt.samples)
        if suite == "dpg-bench":
            found.append(ImageFile(folder / f"{prompt.id}.png", prompt, tuple(range(count))))
        elif suite == "geneval":
            inside = folder / prompt.id / "samples"
            found += [ImageFile(inside / f"{index:04d}.png", prompt, (index,)) for index in range(count)]
        else:
            inside = folder / prompt.group if suite == "hpsv3" else folder
            names = [prompt.id] if count == 1 else [f"{prompt.id}_{index}" for index in range(count)]
            found += [ImageFile(inside / f"{name}.png", prompt, (index,)) for index, name in enumerate(names)]
    return found


def write_companions(suite: str, folder: Path, prompts: Iterable[Prompt]) -> None:
    """Write what the layout wants beside the images: metadata.jsonl (GenEval), the prompt's text (HPSv3)."""
    for prompt in prompts:
        if suite == "geneval":
            _write_once(folder / prompt.id / "metadata.jsonl", json.dumps(dict(prompt.data)) + "\n")
        elif suite == "hpsv3":
            _write_once(folder / prompt.group / f"{prompt.id}.txt", prompt.text)


def _write_once(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        files.write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Found:
    """Images made elsewhere: those that can be scored, what is missing, and what is wrong, one line each."""

    files: list[ImageFile]
    missing: list[str]
    faults: list[str]


def read_folder(suite: str, folder: Path, prompts: Sequence[Prompt], size: Size | None) -> Found:
    """Look through a folder of images in a suite's official layout, without decoding them.

    ``size`` is that of one sample, (height, width), and only DPG-Bench's grids need it; elsewhere None.
    """
    reader = {"geneval": _read_geneval, "dpg-bench": _read_grids, "hpsv3": _read_flat}[suite]
    found = reader(folder, prompts, size)
    faults = [f"{file.path}: {reason}" for file in found.files if (reason := _fault(file.path))]
    return Found(found.files, found.missing, found.faults + faults)


def _fault(path: Path) -> str | None:
    if path.suffix == ".png":
        reason = png.fault(path)
        return f"{reason}; make it again" if reason else None
    try:
        png.size(path)
    except (OSError, SyntaxError, ValueError) as error:
        return f"not an image ({error}); make it again"
    return None


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix.lower() in PICTURES)


def _numbered(folder: Path, wanted: int, faults: list[str]) -> list[Path]:
    """The files ``<digits>.png`` of a folder in order of number; others are noted."""
    numbered: dict[int, Path] = {}
    for path in _pictures(folder):
        if path.suffix != ".png":
            faults.append(f"{path}: the official scorer ignores all but .png; save it as png")
        elif not path.stem.isdecimal():
            faults.append(f"{path}: the official scorer ignores names that are not a number; rename it")
        elif int(path.stem) in numbered:
            faults.append(f"{path}: the same number as {numbered[int(path.stem)].name}; remove one")
        else:
            numbered[int(path.stem)] = path
    ordered = [numbered[number] for number in sorted(numbered)]
    if len(ordered) > wanted:
        faults.append(f"{folder}: {len(ordered)} images, the protocol has {wanted}; remove the extra ones")
    return ordered[:wanted]


def _read_geneval(folder: Path, prompts: Sequence[Prompt], size: Size | None) -> Found:
    found, missing, faults = [], [], []
    known = {prompt.id: prompt for prompt in prompts}
    # The official reader takes any name of digits as the line number, so 12 is 00012.
    inside: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()):
        key = f"{int(path.name):05d}"
        if key in inside:
            faults.append(f"{path}: the same prompt as {inside[key].name}; remove one")
        elif key not in known:
            faults.append(f"{path}: no such prompt among {len(prompts)}; remove it, or name the file of your prompts")
        else:
            inside[key] = path
    faults += [f"{path}: lies outside the layout <prompt>/samples/<number>.png" for path in _pictures(folder)]
    for key, prompt in known.items():
        place = inside.get(key, folder / key)
        if (place / "metadata.jsonl").is_file():
            try:
                data = json.loads((place / "metadata.jsonl").read_text(encoding="utf-8"))
            except ValueError as error:
                faults.append(f"{place / 'metadata.jsonl'}: not JSON ({error})")
                continue
            if data != dict(prompt.data):
                given = data.get("prompt") if isinstance(data, dict) else data
                faults.append(f"{place / 'metadata.jsonl'}: is of {given!r}, prompt {key} is {prompt.text!r}")
        shots = _numbered(place / "samples", prompt.samples, faults) if (place / "samples").is_dir() else []
        found += [ImageFile(path, prompt, (index,)) for index, path in enumerate(shots)]
        if len(shots) < prompt.samples:
            missing.append(f"{place / 'samples'}: {len(shots)} of {prompt.samples} images")
    return Found(found, missing, faults)


def _read_grids(folder: Path, prompts: Sequence[Prompt], size: Size | None) -> Found:
    found, missing, faults = [], [], []
    known = {prompt.id: prompt for prompt in prompts}
    taken: dict[str, Path] = {}
    for path in _pictures(folder):
        key = path.name.split(".")[0]  # as the official reader names items
        if key not in known:
            faults.append(f"{path}: no item {key!r} in the questions; remove it")
        elif key in taken:
            faults.append(f"{path}: the same item as {taken[key].name}; remove one")
        else:
            taken[key] = path
            if reason := _not_a_grid(path, size):
                faults.append(f"{path}: {reason}")
    for key, prompt in known.items():
        if key in taken:
            found.append(ImageFile(taken[key], prompt, tuple(range(prompt.samples))))
        elif (folder / key).is_dir():
            shots = _numbered(folder / key, prompt.samples, faults)
            found += [ImageFile(path, prompt, (index,)) for index, path in enumerate(shots)]
            if len(shots) < prompt.samples:
                missing.append(f"{folder / key}: {len(shots)} of {prompt.samples} images")
        else:
            missing.append(f"{folder / key}.png: no image")
    return Found(found, missing, faults)


def _not_a_grid(path: Path, size: Size | None) -> str | None:
    if size is None:
        raise UsageError(f"{path}: say how many pixels a sample of the grids has, --set eval.size=1024")
    try:
        height, width = png.size(path)
    except (OSError, SyntaxError, ValueError):
        return None  # a broken file has a line of its own
    if (height, width) == (GRID * size[0], GRID * size[1]):
        return None
    wanted = f"{GRID * size[1]}x{GRID * size[0]}"
    return f"is {width}x{height}; a 2 x 2 grid of samples of {size[1]}x{size[0]} pixels is {wanted}"


def _read_flat(folder: Path, prompts: Sequence[Prompt], size: Size | None) -> Found:
    found, missing, faults = [], [], []
    taken: dict[str, Path] = {}
    by_place = {(prompt.group, prompt.id): prompt for prompt in prompts}
    by_text = {(prompt.group, prompt.text): prompt for prompt in prompts}
    for group in dict.fromkeys(prompt.group for prompt in prompts):
        for path in sorted((folder / group).rglob("*")):
            if path.suffix.lower() not in PICTURES:
                continue
            words = path.with_suffix(".txt")
            text = words.read_text(encoding="utf-8") if words.is_file() else None
            prompt = by_place.get((group, path.stem)) if text is None else by_text.get((group, text.rstrip("\n")))
            if text is not None and prompt is None:
                prompt = by_text.get((group, text.split("\n")[0]))  # the official generator adds a path below
            if prompt is None:
                faults.append(f"{path}: neither its name nor {words.name} is a prompt of {group}; remove it")
            elif prompt.id in taken:
                faults.append(f"{path}: the same prompt as {taken[prompt.id].name}; remove one")
            else:
                taken[prompt.id] = path
    for prompt in prompts:
        if prompt.id in taken:
            found.append(ImageFile(taken[prompt.id], prompt, (0,)))
        else:
            missing.append(f"{folder / prompt.group / prompt.id}.png: no image")
    return Found(found, missing, faults)
