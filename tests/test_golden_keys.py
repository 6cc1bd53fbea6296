"""Golden lists of the real checkpoints' keys, one ``name shape`` a line, against our maps and classes at full size.

The detector's names are mmdet 2.27's, the others' those of the official packages: their patterns are checked against
the tiny official checkpoints where those are at hand. mPLUG has the sizes expected of "large": its file was not read.
"""

import re
from pathlib import Path

import pytest
import torch
from parity import SHARED, answers
from safetensors import safe_open
from transformers import Mask2FormerForUniversalSegmentation, Qwen2VLConfig

from flux2pixel.evaluate.dpg_bench import judges
from flux2pixel.evaluate.dpg_bench.mplug import Config
from flux2pixel.evaluate.geneval import checkpoint
from flux2pixel.evaluate.hpsv3 import model as hpsv3

GOLDEN = Path(__file__).parent / "golden"
MPLUG_BERT = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "text_encoder_layers": 6,
    "fusion_layers": 6,
    "num_hidden_layers": 12,
    "text_decode_layers": 12,
    "stride_layer": 6,
}


def golden(name):
    """The keys of a list, ranges like ``{0..8}`` written out, as empty tensors of their shapes."""
    tensors = {}
    for line in (GOLDEN / f"{name}.txt").read_text().splitlines():
        key, shape = line.split()
        span = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        keys = [key.replace(span[0], str(i)) for i in range(int(span[1]), int(span[2]) + 1)] if span else [key]
        for one in keys:
            assert one not in tensors
            tensors[one] = torch.empty([int(side) for side in shape.split("x")], device="meta")
    return tensors


def patterns(keys):
    return {re.sub(r"\d+", "N", key) for key in keys}


@pytest.mark.parametrize(
    ("name", "tiny", "count"),
    [("mask2former_swin_s", "m2f_tiny", 649), ("hpsv3", "hpsv3_tiny", 736), ("mplug_large", "mplug_tiny", None)],
)
def test_names_follow_the_official_tiny_checkpoints(name, tiny, count):
    keys = golden(name)
    assert count is None or len(keys) == count
    answers("geneval_m2f.json")
    with safe_open(SHARED / "parity" / f"{tiny}.safetensors", framework="pt") as file:
        assert patterns(keys) == patterns(set(file.keys()) - {"__images__"})


def test_the_official_detector_converts_and_loads_strictly_at_full_size(tmp_path):
    source = {key: torch.zeros(tensor.shape) for key, tensor in golden("mask2former_swin_s").items()}
    assert len(checkpoint.convert(source)) == 757
    checkpoint.save(source, checkpoint.official_config(), tmp_path, {})
    loaded = checkpoint.load(tmp_path)
    with torch.device("meta"):
        wanted = Mask2FormerForUniversalSegmentation(checkpoint.official_config())
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}
    assert sum(p.numel() for p in loaded.parameters()) == pytest.approx(68.7e6, rel=1e-3)


def test_the_official_reward_model_takes_every_key():
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16}
    mrope = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    config = Qwen2VLConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_scaling=mrope,
        vision_config=vision,
        tie_word_embeddings=False,
    )
    network = hpsv3.build(config, golden("hpsv3"))
    assert network.backbone.language_model.embed_tokens.weight.shape == (151658, 3584)
    assert sum(p.numel() for p in network.parameters()) * 2 == pytest.approx(15.5e9, rel=0.02)  # and 1.1e9 of lm_head


def test_the_official_judge_takes_its_keys():
    weights = golden("mplug_large")
    config = Config.read(MPLUG_BERT, 504, weights)
    assert (config.vision_layers, config.vision_width, config.vision_patch) == (24, 1024, 14)
    assert not any(map(config.concatenates, range(6)))
    network, ignored = judges.build(config, weights, "mPLUG-large")
    unused = {"visual_encoder.visual.proj", "text_decoder.cls.predictions.decoder.weight"}
    left = weights.keys() - network.state_dict().keys()
    assert unused < left and len(left) == ignored
    # Beside those: position tables, the tied head's second bias, and the first six fusion layers, which never run.
    assert all(re.search(r"position_ids|decoder\.bias|encoder\.layer\.[0-5]\.", key) for key in left - unused)
