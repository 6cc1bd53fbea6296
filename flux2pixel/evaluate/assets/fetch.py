"""Scorer weights and data: got once from their public sources, checked, converted, and named by digest ever after.

What is published with a digest is pinned here by it. For the rest the digest of the first fetch is written to
``digests.json`` in the assets folder and every later fetch must agree with it: compare that file between machines.
A file that is already in ``<assets>/downloads`` under its own name is checked and taken, so that a machine without
a network can be served by copying.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import bar, log

SUITES = ("geneval", "dpg-bench", "hpsv3", "fidelity")
CHUNK = 1 << 20
HUB = "https://huggingface.co"
_OPENMMLAB = "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
_MPLUG = "https://www.modelscope.cn/models/iic/mplug_visual-question-answering_coco_large_en/resolve/master"
_BENCHMARK = f"{HUB}/datasets/MizzenAI/HPDv3/resolve/main/benchmark"
_QWEN = f"{HUB}/Qwen/Qwen2-VL-7B-Instruct/resolve/main"
QWEN_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
MPLUG_FILES = ("config.yaml", "config_bert.json", "vocab.txt", "pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """A file to get: ``name`` in the downloads, its public ``url``, and what pins it.

    ``sha256`` may be the first digits only; ``git_blob`` is the id that git gives the file; neither: the first fetch.
    """

    name: str
    url: str
    sha256: str = ""
    git_blob: str = ""


DETECTOR = Source(
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    f"{_OPENMMLAB}/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    sha256="743b7d99",
)
_CLIP_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
CLIP = Source(
    "ViT-L-14.pt", f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-L-14.pt", sha256=_CLIP_SHA256
)
QUESTIONS = Source(
    "dpg_bench.csv",
    "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv",
    git_blob="98457fc9901943f51ff9a30367250fc292533bed",
)
MPLUG = tuple(Source(f"mplug/{name}", f"{_MPLUG}/{name}") for name in MPLUG_FILES)
CLIP_FILE = "geneval/clip.safetensors"  # where it is kept: GenEval's colours and the CLIP score share it
INCEPTION = Source(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
)
ALEXNET = Source(
    "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", sha256="7be5be79"
)
INCEPTION_FILE, ALEXNET_FILE = f"fidelity/{INCEPTION.name}", f"fidelity/{ALEXNET.name}"
HPSV3 = Source("HPSv3.safetensors", f"{HUB}/MizzenAI/HPSv3/resolve/main/HPSv3.safetensors")
QWEN = tuple(Source(f"qwen2-vl/{name}", f"{_QWEN}/{name}") for name in QWEN_FILES)


def default_folder() -> Path:
    """Where assets are kept unless told otherwise: ``$FLUX2PIXEL_ASSETS``, else the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FLUX2PIXEL_ASSETS") or cache / "flux2pixel" / "eval")


class Assets:
    """The folder that holds what the scorers read, with the digests of what it was made from."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every source file ever fetched here, by name."""
        path = self.folder / "digests.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def get(self, source: Source) -> Path:
        """Return the checked source file, downloading what is not there; resumes a part left by an earlier try.

        Raises Flux2PixelError if it cannot be had or is not what was pinned.
        """
        path = self.folder / "downloads" / source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            download(source.url, path)
        found = files.digest(path)
        wanted = source.sha256 or ("" if source.git_blob else self.digests.get(source.name, ""))
        if not found.startswith(wanted):
            raise Flux2PixelError(f"{path}: sha256 {found[:16]}..., want {wanted[:16]}...; delete it and fetch again")
        if source.git_blob:
            from flux2pixel.evaluate.dpg_bench.questions import git_blob

            if (blob := git_blob(path.read_bytes())) != source.git_blob:
                raise Flux2PixelError(
                    f"{path}: git blob {blob[:12]}, want {source.git_blob[:12]}; delete it and fetch again"
                )
        if self.digests.get(source.name) != found:
            files.write_json(self.folder / "digests.json", self.digests | {source.name: found})
        return path

    def place(self, source: Source, target: str) -> None:
        """Get a file and put it at ``target`` in the folder; nothing is done where it is."""
        path = self.folder / target
        if not path.is_file():
            got = self.get(source)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(got, path)

    def make(self, source: Source, target: str, convert: Callable[[Path, Path, dict[str, str]], None]) -> None:
        """Get a file and ``convert(source, target, facts)`` it, once; the source is then removed."""
        path = self.folder / target
        if path.is_file():
            return
        got = self.get(source)
        log(f"converting {source.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        convert(got, path, {"source": source.url, "source_sha256": self.digests[source.name]})
        got.unlink()


def download(url: str, path: Path) -> None:
    """Get ``url`` into ``path``, whole or not at all; a part is kept beside it and continued next time."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206
            total = int(answer.headers.get("Content-Length") or 0)
            whole = total + have * resumed if total else None
            with part.open("ab" if resumed else "wb") as file, bar(path.name[:14], whole, unit="bytes") as progress:
                progress.skip(have * resumed)
                while block := answer.read(CHUNK):
                    file.write(block)
                    progress.advance(len(block))
                file.flush()
                os.fsync(file.fileno())
            got = part.stat().st_size - (have if resumed else 0)
            if total and got != total:
                raise Flux2PixelError(f"{url}: the connection ended after {got} of {total} bytes; fetch again to go on")
    except urllib.error.HTTPError as error:
        raise Flux2PixelError(f"{url}: {error.code} {error.reason}; get it by hand and put it at {path}") from error
    except OSError as error:
        why = getattr(error, "reason", error)
        raise Flux2PixelError(f"{url}: cannot be reached ({why}); get it elsewhere and put it at {path}") from error
    os.replace(part, path)


def fetch(suites: Sequence[str], folder: Path) -> None:
    """Get and convert all that these suites' scorers need into ``folder``; what is there already is left alone."""
    from flux2pixel.evaluate.assets import convert as made

    if strange := [suite for suite in suites if suite not in SUITES]:
        raise UsageError(f"--fetch {strange[0]}: known are {', '.join(SUITES)}")
    assets = Assets(folder)
    if "geneval" in suites:
        assets.make(DETECTOR, "geneval/detector/model.safetensors", made.detector)
    if "geneval" in suites or "fidelity" in suites:
        assets.make(CLIP, CLIP_FILE, made.clip)
    if "fidelity" in suites:
        assets.place(INCEPTION, INCEPTION_FILE)
        assets.place(ALEXNET, ALEXNET_FILE)
    if "dpg-bench" in suites:
        assets.place(QUESTIONS, "dpg-bench/dpg_bench.csv")
        for source in MPLUG[:-1]:
            assets.place(source, f"dpg-bench/{source.name}")
        assets.make(MPLUG[-1], "dpg-bench/mplug/model.safetensors", made.mplug)
    if "hpsv3" in suites:
        from flux2pixel.evaluate.hpsv3.benchmark import CATEGORIES

        made.instruction(folder / "hpsv3" / "instruction.txt")
        for category in CATEGORIES:
            name = f"benchmark_{category}.json"
            source = Source(f"hpdv3/{name}", f"{_BENCHMARK}/{name.replace(' ', '%20')}")
            assets.place(source, f"hpsv3/benchmark/{name}")
        for source in QWEN:
            assets.place(source, f"hpsv3/{source.name}")
        assets.place(HPSV3, "hpsv3/HPSv3.safetensors")
    log(f"fetched {', '.join(suites)} into {folder}")
