"""Open the official scorers from an assets folder (`fetch`): one line says what to fetch where something is absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flux2pixel.evaluate.suite import Prompt
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError


def geneval_prompts(metadata: Path | None = None) -> list[Prompt]:
    """GenEval's 553 prompts, or those of a metadata file of one's own."""
    from flux2pixel.evaluate.geneval import promptset

    return promptset.prompts(promptset.read(metadata) if metadata else promptset.metadata())


def geneval(assets: Path, device: str, prompts: Sequence[Prompt], batch: int = 8) -> Any:
    """GenEval with the official detector and colours."""
    from flux2pixel.evaluate.geneval import GenEval, checkpoint, mask2former

    folder = assets / "geneval" / "detector"
    seen = colors(assets / "geneval" / "clip.safetensors", device)
    detector = mask2former.Mask2Former(checkpoint.load(folder, device), seen, checkpoint.source(folder))
    return GenEval(prompts, detector, batch)


def colors(weights: Path, device: str) -> Any:
    """GenEval's colours by CLIP ViT-L/14."""
    import open_clip

    from flux2pixel.evaluate.geneval.colors import MODEL, ColorClassifier

    model, metadata = clip_model(weights, device)
    return ColorClassifier(model, open_clip.get_tokenizer(MODEL), metadata)


def clip_model(weights: Path, device: str) -> tuple[Any, dict[str, str]]:
    """CLIP ViT-L/14 with QuickGELU from OpenAI's weights as `fetch` converted them, frozen, and where they are from."""
    import open_clip

    from flux2pixel.evaluate.geneval.colors import MODEL

    if not weights.is_file():
        raise UsageError(f"{weights}: no CLIP weights there; `flux2pixel eval --suite geneval --fetch` makes them")
    tensors, metadata = files.read_tensors(weights)
    with torch.device("cpu"):
        model = open_clip.create_model(MODEL, pretrained=None, load_weights=False)
    unmatched = model.load_state_dict(tensors, strict=False)
    # open_clip keeps the causal mask as a buffer, which is not in OpenAI's file.
    missing = [name for name in unmatched.missing_keys if name != "attn_mask"]
    if missing or unmatched.unexpected_keys:
        first = (missing or unmatched.unexpected_keys)[0]
        raise Flux2PixelError(f"{weights}: does not fit {MODEL} ({first}); fetch it again")
    return model.to(device).eval().requires_grad_(False), dict(metadata)


def dpg_bench_prompts(assets: Path, texts: Path | None = None) -> tuple[list[Prompt], str]:
    """DPG-Bench's prompts and the csv's blob id; ``texts``: the official .txt files or JSON Lines to generate from."""
    from flux2pixel.evaluate.dpg_bench import prompts, read, read_texts

    path = assets / "dpg-bench" / "dpg_bench.csv"
    if not path.is_file():
        raise UsageError(f"{path}: absent; `flux2pixel eval --suite dpg-bench --fetch` gets it")
    rows, blob = read(path)
    return prompts(rows, read_texts(texts) if texts else None), blob


def dpg_bench(assets: Path, device: str, prompts: Sequence[Prompt], blob: str, judge: str = "", batch: int = 8) -> Any:
    """DPG-Bench with the official mPLUG, or with the vision-language model ``judge`` (a folder or Hub id), so named."""
    from flux2pixel.evaluate.dpg_bench import DpgBench, judges

    vqa = judges.VlmJudge(judge, device) if judge else judges.load(assets / "dpg-bench" / "mplug", device)
    return DpgBench(prompts, vqa, blob, batch)


def hpsv3_prompts(assets: Path) -> list[Prompt]:
    """HPDv3's benchmark prompts."""
    from flux2pixel.evaluate.hpsv3 import read

    return read(assets / "hpsv3" / "benchmark")


def hpsv3(assets: Path, device: str, prompts: Sequence[Prompt], script_text: bool = False, batch: int = 16) -> Any:
    """HPSv3 with the official weights."""
    from flux2pixel.evaluate.assets.fetch import HPSV3, Assets
    from flux2pixel.evaluate.hpsv3 import Hpsv3, model, unchanged

    folder, fetched = assets / "hpsv3", Assets(assets).digests
    digest = {"source_sha256": fetched.get(HPSV3.name, "not fetched here")} if fetched else {}
    reward = model.load(folder / "HPSv3.safetensors", folder / "qwen2-vl", folder / "instruction.txt", device, digest)
    return Hpsv3(prompts, reward, script_text, batch, unchanged(folder / "benchmark", fetched))
