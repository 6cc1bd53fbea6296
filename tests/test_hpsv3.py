"""HPSv3: text, images, the network with plain positions, the benchmark's table, the suite."""

import hashlib
import json

import numpy as np
import pytest
import torch
from parity import SHARED, answers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig

from flux2pixel.evaluate import hpsv3
from flux2pixel.evaluate.hpsv3 import benchmark, inputs, model
from flux2pixel.evaluate.suite import Record, Sample
from flux2pixel.runtime.errors import Flux2PixelError, UsageError


def instruction():
    path = SHARED / "evaldata" / "hpsv3" / "instruction.txt"
    if not path.is_file():
        pytest.skip("HPSv3's instruction is not at hand")
    return inputs.read_instruction(path)


def picture(width, height):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(7 * x + 3 * y) % 256, (x * x // 97 + 11 * y) % 256, ((13 * x) ^ (5 * y)) % 256], -1).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def tiny():
    official = answers("hpsv3.json")["tiny"]
    weights = {k: v.float() for k, v in load_file(SHARED / "parity" / "hpsv3_tiny.safetensors").items()}
    return official, weights


def config(official):
    return Qwen2VLConfig(**{k: v for k, v in official["config"].items() if k != "transformers_version"})


def test_parity_of_the_texts():
    official = answers("hpsv3.json")
    constants = official["constants"]
    assert constants["suffix"] == inputs.SUFFIX and constants["special_token"] == inputs.REWARD
    assert constants["min_pixels"] == constants["max_pixels"] == inputs.AREA
    for case in official["chat_texts"]:
        text = inputs.chat_text(instruction(), case["prompt"])
        assert text == case["chat_text"] and hashlib.sha256(text.encode()).hexdigest() == case["sha256"]


def test_an_instruction_that_an_editor_touched_is_refused(tmp_path):
    path = tmp_path / "instruction.txt"
    with pytest.raises(UsageError, match="no HPSv3 instruction there"):
        inputs.read_instruction(path)
    path.write_text("\n".join(line.rstrip() for line in instruction().split("\n")))
    with pytest.raises(UsageError, match="even spaces matter"):
        inputs.read_instruction(path)


def test_parity_of_sizes_and_packed_images():
    official = answers("hpsv3.json")
    for case in official["smart_resize"]:
        assert inputs.resized(case["width"], case["height"]) == (case["resized_width"], case["resized_height"])
        grid = inputs.grid_of(case["width"], case["height"])
        assert list(grid) == case["grid_thw"] and inputs.image_tokens(grid) == case["image_tokens"]
    for case in official["image_preprocess"]:
        small = inputs.shrink(picture(case["width"], case["height"]))
        for column, row, *rgb in case["resized_rgb_samples"]:
            assert small[row, column].tolist() == rgb
        packed = inputs.pack(small)
        assert list(packed.shape) == case["shape"]
        assert packed.double().mean().item() == pytest.approx(case["mean"], abs=1e-6)
        assert packed.double().std(correction=0).item() == pytest.approx(case["std"], abs=1e-6)
        for row, column, value in case["samples"]:
            assert abs(packed[row, column].item() - value) < 1e-6
    with pytest.raises(UsageError, match="too long for Qwen2-VL"):
        inputs.resized(4000, 10)


def test_parity_of_the_network_batched_and_alone(tiny):
    official, weights = tiny
    network = model.build(config(official), weights, torch.float32)
    ids, mask = torch.tensor(official["input_ids"]), torch.tensor(official["attention_mask"])
    grids, pixels = torch.tensor(official["image_grid_thw"]), torch.tensor(official["pixel_values"])
    (token,) = official["special_token_ids"]
    expected = torch.tensor(official["expected_logits_mu_logsigma"])
    with torch.inference_mode():
        together = network(ids, mask, pixels, grids, token)
        torch.testing.assert_close(together, expected, rtol=0, atol=official["tolerance"])
        wrong = torch.tensor(official["wrong_logits_if_mrope_positions"])
        assert (together - wrong).abs().max() > 0.1
        for row, part in enumerate(pixels.split(grids.prod(1).tolist())):
            cut = ids[row].tolist().index(token) + 1  # nothing after the reward token counts
            alone = network(ids[row : row + 1, :cut], mask[row : row + 1, :cut], part, grids[row : row + 1], token)
            torch.testing.assert_close(
                alone[0], torch.tensor(official["expected_logits_unbatched"][row]), rtol=0, atol=official["tolerance"]
            )


def test_every_key_is_accounted_for(tiny):
    official, weights = tiny
    assert [key for key in weights if model.rename(key) is None] == ["lm_head.weight"]
    with pytest.raises(Flux2PixelError, match=r"extra\.weight: not a key"):
        model.build(config(official), weights | {"extra.weight": torch.zeros(1)})
    with pytest.raises(Flux2PixelError, match=r"1 weights unexpected, such as backbone\.visual\.more"):
        model.build(config(official), weights | {"visual.more": torch.zeros(1)})
    with pytest.raises(Flux2PixelError, match=r"1 weights missing, such as rm_head\.5\.bias"):
        model.build(config(official), {k: v for k, v in weights.items() if k != "rm_head.5.bias"})
    with pytest.raises(Flux2PixelError, match="1 weights of another size"):
        model.build(config(official), weights | {"model.norm.weight": torch.zeros(3)})
    half = model.build(config(official), weights)
    assert half.rm_head[0].weight.dtype == torch.float32
    assert next(half.backbone.parameters()).dtype == torch.bfloat16


def test_parity_of_the_table():
    official = answers("hpsv3.json")["benchmark_aggregation"]
    table = hpsv3.aggregate(official["rewards"])
    assert table.keys() == official["expected"].keys()
    for name, row in official["expected"].items():
        assert table[name] == pytest.approx(row, abs=1e-9)


def write_benchmark(folder, entries=2):
    for category in hpsv3.CATEGORIES:
        rows = [{"caption": f"{category} one", "category": category, "image_file": "a/b.jpg", "aspect_ratio": 0.5}]
        rows += [
            {
                "caption": "two\nlines",
                "category": category,
                "image_file": None,
                "save_name": "s",
                "width": 3,
                "height": 2,
            }
        ]
        (folder / f"benchmark_{category}.json").write_text(json.dumps(rows[:entries]))


def test_the_benchmark_is_read_with_sizes_and_both_texts(tmp_path):
    with pytest.raises(UsageError, match=r"benchmark_Characters\.json: absent"):
        hpsv3.read(tmp_path)
    write_benchmark(tmp_path)
    prompts = hpsv3.read(tmp_path)
    assert len(prompts) == 24 and len({prompt.id for prompt in prompts}) == 24
    first, second = prompts[:2]
    assert (first.id, first.group, first.text, first.samples) == ("Characters-00000", "Characters", "Characters one", 1)
    assert first.data["size"] == (1408, 704) and second.data["size"] == (832, 1216)
    assert first.data["script_text"] == "Characters one\n\na/b.jpg"
    assert second.data["script_text"] == "two\n\nlines\n\ns"
    assert benchmark.size_of({"image_file": "x", "aspect_ratio": 1.0}) == (1024, 1024)
    (tmp_path / "benchmark_Food.json").write_text('[{"caption": "x"}]')
    with pytest.raises(UsageError, match=r"benchmark_Food\.json: an entry lacks"):
        hpsv3.read(tmp_path)
    (tmp_path / "benchmark_Food.json").write_text("[")
    with pytest.raises(UsageError, match=r"benchmark_Food\.json: not JSON"):
        hpsv3.read(tmp_path)


class Brightness:
    """Rewards brightness, and long texts."""

    def __call__(self, images, prompts):
        return [(float(image.mean()) + len(prompt), 1.0) for image, prompt in zip(images, prompts, strict=True)]

    def provenance(self):
        return {"name": "brightness"}


def test_the_suite_means_its_categories_and_says_which_text_it_scored(tmp_path):
    write_benchmark(tmp_path)
    suite = hpsv3.Hpsv3(hpsv3.read(tmp_path), Brightness())
    samples = []
    for number, prompt in enumerate(suite.prompts):
        Image.new("RGB", (8, 8), (number, number, number)).save(tmp_path / f"{prompt.id}.png")
        samples.append(Sample(prompt, 0, tmp_path / f"{prompt.id}.png"))
    records = list(suite.score(samples))
    assert records[0].score == len("Characters one") and records[0].details == {"sigma": 1.0}
    summary = hpsv3.summarise(suite.prompts, (Record(**record.as_dict()) for record in records))
    assert summary["overall"]["score"] == pytest.approx(summary["table"]["OVERALL"]["mean"])
    assert summary["scored_text"] == "caption only" and set(summary["groups"]) == set(hpsv3.CATEGORIES)
    partial = hpsv3.summarise(suite.prompts, records[1:])
    assert (
        "overall" not in partial
        and "OVERALL" not in partial["table"]
        and partial["missing"] == [("Characters-00000", 0)]
    )
    scripted = hpsv3.Hpsv3(suite.prompts, Brightness(), script_text=True)
    assert next(scripted.score(samples)).score == len("Characters one\n\na/b.jpg")
    assert scripted.provenance()["scored_text"] == "script" != suite.provenance()["scored_text"]


class Words:
    """A tokenizer of whole words for the tiny vocabulary."""

    special = {inputs.IMAGE_PAD: 193, inputs.REWARD: 197}  # noqa: RUF012

    def convert_tokens_to_ids(self, token):
        return self.special[token]

    def __call__(self, text, add_special_tokens):
        for token in self.special:
            text = text.replace(token, f" {token} ")
        return {"input_ids": [self.special.get(word, sum(map(ord, word)) % 190) for word in text.split()]}


def test_images_of_any_size_score_together_as_alone(tiny):
    official, weights = tiny
    reward = model.Reward(model.build(config(official), weights, torch.float32), Words(), instruction(), {})
    images, texts = [picture(64, 32), picture(32, 48)], ["a dog", "a much longer text about a cat"]
    together = reward(images, texts)
    alone = [reward([image], [text])[0] for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert reward.tokens("a dog", 3).count(193) == 3 and reward.tokens("a dog", 3)[-1] == 197
    with pytest.raises(UsageError, match="which HPSv3 takes for its own"):
        reward.tokens("a <|Reward|>", 3)
    grown = model.build(config(official), weights | {"model.embed_tokens.weight": torch.zeros(199, 64)}, torch.float32)
    with pytest.raises(UsageError, match="the reward token is 197 in the tokenizer, but the weights have 199 words"):
        model.Reward(grown, Words(), "", {})


def test_files_that_are_absent_have_messages(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UsageError, match="no Qwen2-VL config there"):
        model.load(tmp_path / "HPSv3.safetensors", tmp_path, tmp_path / "instruction.txt")
