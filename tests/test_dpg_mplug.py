"""mPLUG, DPG-Bench's judge: the official network's beams, and what reading its folder checks."""

import json

import numpy as np
import pytest
import torch
from parity import SHARED, answers
from safetensors.torch import load_file, save_file

from flux2pixel.evaluate.dpg_bench import judges
from flux2pixel.evaluate.dpg_bench.beam import search
from flux2pixel.evaluate.dpg_bench.mplug import Config
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

ENGLISH = ["is", "the", "dog", "red", "?", "a", "there", "cat", "on", "left", "of"]
TIED = "text_decoder.cls.predictions.decoder.weight"


@pytest.fixture(scope="module")
def tiny():
    official = answers("dpg_mplug.json")
    weights = {k: v.float() for k, v in load_file(SHARED / "parity" / "mplug_tiny.safetensors").items()}
    return official, weights.pop("__images__"), weights


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny judge as a converted folder, with English words in its vocabulary."""
    official, _, weights = tiny
    variant = official["variants"][0]
    (tmp_path / "config_bert.json").write_text(json.dumps(variant["config_bert"]))
    (tmp_path / "config.yaml").write_text("image_res: 56\nbeam_size: 5\nmin_length: 1\nmax_length: 10\n")
    words = list(variant["vocab"])
    words[1 : 1 + len(ENGLISH)] = ENGLISH
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    wrapped = {"model": {"module": {f"model.{k}": v for k, v in weights.items()}}}
    wrapped["model"]["module"]["model.visual_encoder_m.visual.proj"] = torch.zeros(1)
    save_file(judges.convert(wrapped), tmp_path / judges.WEIGHTS, {"sha256": "of the source"})
    return tmp_path


def test_parity_of_the_beams(tiny):
    official, images, weights = tiny
    shortcuts = 0
    for variant in official["variants"]:
        config = Config.read(variant["config_bert"], variant["config"]["image_res"], weights)
        assert any(map(config.concatenates, range(config.fusion_layers))) == (variant["name"] == "with_concat")
        model, _ = judges.build(config, weights, "tiny")
        for case in variant["cases"]:
            ids, mask = torch.tensor([case["input_ids"]]), torch.tensor([case["attention_mask"]])
            with torch.inference_mode():
                memory = model.read(model.see(images[case["image_seed_index"]][None]), ids, mask)
                logits = model.step(torch.tensor([101]), model.start(memory, 1))[0]
            (best,) = search(model, memory)
            assert list(best.ids) == case["beam_ids"]
            assert best.score == pytest.approx(case["beam_score"], abs=1e-3)
            torch.testing.assert_close(logits[:12], torch.tensor(case["first_logits_head"]), rtol=0, atol=1e-4)
            assert logits.argmax().item() == case["first_token_argmax"]
            assert memory.joined().mean().item() == pytest.approx(case["fused_state_mean"], abs=1e-5)
            assert memory.joined().std().item() == pytest.approx(case["fused_state_std"], abs=1e-5)
            shortcuts += best.ids[1] != logits.argmax().item()
    assert shortcuts == 8  # the first token alone is another rule


@pytest.mark.parametrize("variant", [0, 1])
def test_questions_asked_together_of_one_encoding_answer_as_one_by_one(tiny, variant):
    official, images, weights = tiny
    variant = official["variants"][variant]
    config = Config.read(variant["config_bert"], 56, weights)
    model, _ = judges.build(config, weights, "tiny")
    ids = torch.tensor([case["input_ids"] for case in variant["cases"]])
    mask = torch.tensor([case["attention_mask"] for case in variant["cases"]])
    with torch.inference_mode():
        state = model.see(images[:1])
        together = search(model, model.read(state, ids, mask))
        alone = [search(model, model.read(state, i[None], m[None]))[0] for i, m in zip(ids, mask, strict=True)]
    assert [h.ids for h in together] == [h.ids for h in alone]
    assert [h.score for h in together] == pytest.approx([h.score for h in alone], abs=1e-5)


def test_a_folder_becomes_a_judge_that_answers_all_questions_of_each_image(folder):
    judge = judges.load(folder)
    images = [np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), dtype=np.uint8) for i in range(2)]
    asked = [["Is the dog red?", "Is there a cat?"], []]
    one, none = judge.ask(images, asked)
    assert len(one) == 2 and none == []
    assert one == [judge.ask(images[:1], [[question]])[0][0] for question in asked[0]]
    assert judge.pixels(images[0]).shape == (3, 56, 56)
    provenance = judge.provenance()
    assert provenance["name"] == "official" and provenance["sha256"] == "of the source" and provenance["beam_size"] == 5


def test_long_questions_are_cut_and_case_does_not_matter(folder):
    judge = judges.load(folder)
    image = np.zeros((20, 20, 3), np.uint8)
    long = "is the dog red ? " * 20
    assert judge.ask([image], [[long]]) == judge.ask([image], [[long.upper() + "left"]])


def test_bad_folders_have_messages(folder, tiny):
    weights = load_file(folder / judges.WEIGHTS)
    save_file({k: v for k, v in weights.items() if k != "visn_fc.bias"}, folder / judges.WEIGHTS)
    with pytest.raises(Flux2PixelError, match=r"1 weights missing, 0 of another size \(visn_fc.bias is missing"):
        judges.load(folder)
    save_file(weights | {"visn_fc.bias": torch.zeros(3)}, folder / judges.WEIGHTS)
    with pytest.raises(Flux2PixelError, match=r"visn_fc.bias is of another size"):
        judges.load(folder)
    save_file(weights, folder / judges.WEIGHTS)
    (folder / "vocab.txt").write_text("\n".join(tiny[0]["variants"][0]["vocab"]) + "\n")
    with pytest.raises(UsageError, match="does not tokenise plain English"):
        judges.load(folder)
    (folder / "vocab.txt").unlink()
    with pytest.raises(UsageError, match=r"has no vocab\.txt"):
        judges.load(folder)
    with pytest.raises(Flux2PixelError, match="differs from the word embeddings"):
        judges.convert(weights | {TIED: weights[TIED] + 1})
