"""Converting a base of the Hub: planned from remote headers, recorded by commit; cards that say what a model is."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from safetensors.torch import save_file
from tiny_base import write_tiny_base
from typer.testing import CliRunner

from flux2pixel.asymflow.linalg import polar
from flux2pixel.cli import app
from flux2pixel.convert.run import convert
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.weights.adapter import read_adapter
from flux2pixel.weights.header import read_header
from flux2pixel.weights.subspace import write_subspace

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub that holds one repository and notes what is asked of it."""
    repo = write_tiny_base(tmp_path / "remote")
    cache = tmp_path / "models--black-forest-labs--FLUX.2-klein-base-4B" / "snapshots" / COMMIT
    asked = []

    def sizes(repo_id, revision=None, files_metadata=False):
        asked.append(("list", repo_id, revision))
        files = [SimpleNamespace(rfilename=str(p.relative_to(repo)), size=p.stat().st_size) for p in repo.rglob("*.*")]
        return SimpleNamespace(siblings=files, sha=COMMIT)

    def header(repo_id, filename, revision=None):
        asked.append(("header", filename, revision))
        found = read_header(repo / filename)
        first = min(span[0] for span in found.spans.values())
        tensors = {
            name: TensorInfo(dtype, list(shape), tuple(place - first for place in found.spans[name]))
            for name, (dtype, shape) in found.tensors.items()
        }
        return SafetensorsFileMetadata(found.metadata, tensors)

    def snapshot(repo_id, allow_patterns, **named):
        asked.append(("download", tuple(allow_patterns), named.get("revision")))
        weights = any(pattern.startswith("transformer/") for pattern in allow_patterns)
        for path in repo.rglob("*"):
            if path.is_file() and (weights or path.suffix == ".json"):
                (cache / path.relative_to(repo)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / path.relative_to(repo))
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *given, **named: sizes(*given, **named))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "parse_safetensors_file_metadata", lambda self, *given, **named: header(*given, **named)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name, revision=None: str(repo / name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return SimpleNamespace(asked=asked, repo=repo, cache=cache)


def test_a_dry_run_plans_from_remote_headers_and_downloads_no_weight(tmp_path, hub):
    words = ["convert", "--base", "flux2-klein-4b", "--run", str(tmp_path / "run"), "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    for said in (
        "x_embedder.weight  (32, 16) bf16 -> (32, 192) bf16",
        "fetches ",
        "free in its cache",
        "text_encoder/",
    ):
        assert said in result.output, result.output
    assert not list(hub.cache.rglob("*.safetensors")) and not (tmp_path / "run").exists()
    assert {what for what, *_ in hub.asked} == {"list", "header", "download"}
    headers = [name for what, name, _ in hub.asked if what == "header"]
    assert len(headers) == len(set(headers)) == len(list((hub.repo / "transformer").glob("*.safetensors")))


def subspace(tmp_path):
    path = tmp_path / "subspace.safetensors"
    write_subspace(path, polar(torch.randn(192, 16, dtype=torch.float64)), torch.tensor(1.7), {"method": "random"})
    return path


def test_the_record_and_the_card_name_repository_commit_and_licence(tmp_path, hub):
    (hub.repo / "LICENSE.md").write_text("terms")
    out = convert(load(None, ["base=flux2-klein-4b", "convert.verify_steps=2"]), tmp_path, subspace(tmp_path))
    record = json.loads((out / "conversion.json").read_text())
    assert (record["base_repo"], record["base_commit"]) == ("black-forest-labs/FLUX.2-klein-base-4B", COMMIT)
    card = (out / "README.md").read_text()
    for line in ("base_model: black-forest-labs/FLUX.2-klein-base-4B", "license: apache-2.0", COMMIT):
        assert line in card
    assert "pipeline_tag: text-to-image" in card and (out / "LICENSE.md").read_text() == "terms"


# LoRA files of other families, and what is no LoRA ---------------------------------------------------------------


def pair(module, down="lora_down", up="lora_up"):
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    return {f"{module}.{down}.weight": a, f"{module}.{up}.weight": b, f"{module}.alpha": torch.tensor(2.0)}, b @ a


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        ("flux1", "lora_unet_double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0.weight"),
        ("qwen-image", "lora_unet_transformer_blocks_0_attn_to_out_0", "transformer_blocks.0.attn.to_out.0.weight"),
        ("flux2", "lora_unet_double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0.weight"),
    ],
)
def test_a_familys_own_names_are_understood(tmp_path, family, module, expected):
    tensors, change = pair(module)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read_adapter(tmp_path / "lora.safetensors", family)
    assert list(found.pairs) == [expected]
    low = found.pairs[expected]
    assert torch.allclose(low.scale * low.b() @ low.a(), 0.5 * change, atol=1e-5), "alpha / rank = 2 / 4"


@pytest.mark.parametrize("odd", ["dora_scale", "diff", "diff_b", "lokr_w1", "bias"])
def test_a_key_that_is_no_half_of_a_pair_is_refused(tmp_path, odd):
    module = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(pair(module)[0] | {f"{module}.{odd}": torch.zeros(32)}, tmp_path / "lora.safetensors")
    for family in ("flux2", "flux1", "qwen-image"):
        with pytest.raises(Flux2PixelError, match=rf"{odd}: not a half of a LoRA pair"):
            read_adapter(tmp_path / "lora.safetensors", family)


def test_pairs_that_the_translation_loses_are_refused(tmp_path):
    """SD3.5's loader leaves Kohya's names as they are."""
    save_file(pair("lora_unet_joint_blocks_0_x_block_attn_proj")[0], tmp_path / "lora.safetensors")
    with pytest.raises(Flux2PixelError, match=r"not a half of a LoRA pair|understands 0 of its 1"):
        read_adapter(tmp_path / "lora.safetensors", "sd3")
