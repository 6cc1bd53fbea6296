"""The official scorers opened from an assets folder as ``--fetch`` leaves it, with the tiny networks in it."""

import json

import numpy as np
import pytest
import torch
from parity import SHARED, answers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flux2pixel.evaluate import dpg_bench, hpsv3, open_scorers
from flux2pixel.evaluate.dpg_bench import judges
from flux2pixel.evaluate.hpsv3 import inputs
from flux2pixel.evaluate.suite import Sample

# Qwen2-VL's own special words at the tiny model's ids.
SPECIAL = {
    190: "<|endoftext|>",
    193: "<|image_pad|>",
    194: "<|video_pad|>",
    195: "<|vision_start|>",
    196: "<|vision_end|>",
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    tiny = answers("hpsv3.json")["tiny"]
    folder = tmp_path_factory.mktemp("assets")
    home = folder / "hpsv3"
    (home / "benchmark").mkdir(parents=True)
    (home / "qwen2-vl").mkdir()
    for category in hpsv3.CATEGORIES:
        entry = {"caption": f"a {category}", "category": category, "image_file": "x.jpg", "aspect_ratio": 1.0}
        (home / "benchmark" / f"benchmark_{category}.json").write_text(json.dumps([entry]))
    (home / "instruction.txt").write_bytes((SHARED / "evaldata" / "hpsv3" / "instruction.txt").read_bytes())
    weights = load_file(SHARED / "parity" / "hpsv3_tiny.safetensors")
    save_file(weights, home / "HPSv3.safetensors")
    (folder / "digests.json").write_text(json.dumps({"HPSv3.safetensors": "0123"}))
    (home / "qwen2-vl" / "config.json").write_text(json.dumps(tiny["config"]))
    words = {SPECIAL.get(i, f"w{i}"): i for i in range(197)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0", pad_token=SPECIAL[190])
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[i] for i in (193, 194, 195, 196)]})
    fast.save_pretrained(home / "qwen2-vl")
    return folder


def test_hpsv3_scores_from_the_folder(assets, tmp_path):
    suite = open_scorers.hpsv3(assets, "cpu", open_scorers.hpsv3_prompts(assets))
    assert suite.judge == "official" and suite.provenance()["reward"]["source_sha256"] == "0123"
    samples = []
    for number, prompt in enumerate(suite.prompts[:2]):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        samples.append(Sample(prompt, 0, tmp_path / f"{number}.png"))
    first, second = suite.score(samples)
    assert first.score != second.score and first.details["sigma"] > 0
    summary = hpsv3.summarise(suite.prompts, [first, second])
    assert (
        set(summary["groups"]) == {"Characters", "Arts"} and "overall" not in summary and len(summary["missing"]) == 10
    )


def test_the_reward_token_is_one_id_at_the_end_of_the_vocabulary(assets):
    suite = open_scorers.hpsv3(assets, "cpu", open_scorers.hpsv3_prompts(assets))
    ids = suite._rewards.tokens("w5 w6", 4)
    assert ids.count(193) == 4 and ids.count(197) == 1 and ids[-1] == 197


def test_dpg_bench_scores_from_the_folder(assets, tmp_path):
    import csv

    from test_dpg_bench import ROWS
    from test_dpg_mplug import ENGLISH

    official = answers("dpg_mplug.json")["variants"][0]
    home = assets / "dpg-bench" / "mplug"
    home.mkdir(parents=True)
    (home / "config_bert.json").write_text(json.dumps(official["config_bert"]))
    (home / "config.yaml").write_text("image_res: 56\n")
    words = list(official["vocab"])
    words[1 : 1 + len(ENGLISH)] = ENGLISH
    (home / "vocab.txt").write_text("\n".join(words) + "\n")
    weights = load_file(SHARED / "parity" / "mplug_tiny.safetensors")
    save_file(judges.convert({k: v for k, v in weights.items() if k != "__images__"}), home / judges.WEIGHTS)
    with (assets / "dpg-bench" / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    prompts, blob = open_scorers.dpg_bench_prompts(assets)
    suite = open_scorers.dpg_bench(assets, "cpu", prompts, blob)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "x.png")
    samples = [Sample(prompt, index, tmp_path / "x.png") for prompt in prompts for index in range(4)]
    summary = dpg_bench.summarise(prompts, suite.score(samples))
    assert summary["official"]["items"] == 2 and summary["repaired"]["items"] == 3 and "overall" in summary
    assert suite.provenance()["judge"] == "official" and not suite.provenance()["questions_official"]


def test_another_judge_answers_under_another_name(tmp_path):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

    words = ["<unk>", "<pad>", *SPECIAL.values(), "yes", "no", "is", "there", "a", "circle", "Answer", "or"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", eos_token=SPECIAL[190])
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[i] for i in (193, 194, 195, 196)]})
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c['text'] }}{% endif %}{% endfor %}"
        "{% endfor %} Answer"
    )
    image = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
    video = Qwen2VLVideoProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
    processor = Qwen2VLProcessor(image, fast, video, chat_template=template)
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    ids = {name: words.index(SPECIAL[i]) for i, name in ((193, "image_token_id"), (194, "video_token_id"))}
    config = Qwen2VLConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(words),
        vision_config=vision,
        rope_scaling={"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]},
        eos_token_id=words.index(SPECIAL[190]),
        pad_token_id=1,
        vision_start_token_id=words.index(SPECIAL[195]),
        **ids,
    )
    torch.manual_seed(0)
    folder = tmp_path / "tiny-vlm"
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    judge = judges.VlmJudge(str(folder), batch=2)
    pictures = [np.full((40, 40, 3), level, np.uint8) for level in (0, 255)]
    asked = [["is there a circle ?", "is there a no ?"], ["is there a circle ?"]]
    together = judge.ask(pictures, asked)
    assert [len(texts) for texts in together] == [2, 1]
    assert judge.ask(pictures[1:], asked[1:]) == together[1:]
    assert judge.name == "vlm tiny-vlm" and not judge.provenance()["official"]


def test_the_suffix_is_the_protocols():
    import hashlib

    assert hashlib.sha256(inputs.SUFFIX.encode()).hexdigest().startswith("2471faca")
