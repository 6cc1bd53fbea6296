"""GenEval's detector: the key map, what comes before and after the network, and the colours."""

import numpy as np
import pytest
import torch
from parity import SHARED, answers
from PIL import Image
from safetensors.torch import load_file
from transformers import Mask2FormerConfig, SwinConfig

from flux2pixel.evaluate.geneval import CLASSES, COLORS, checkpoint, colors, mask2former, prompts
from flux2pixel.evaluate.geneval.mask2former import Prepared, postprocess, preprocess
from flux2pixel.evaluate.geneval.scorer import GenEval
from flux2pixel.evaluate.suite import Sample
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

TINY_SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 7, "mlp_ratio": 4.0}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def tiny_config():
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 8}
    depths = {"encoder_layers": 2, "encoder_feedforward_dim": 48, "decoder_layers": 4, "dim_feedforward": 64}
    swin = SwinConfig(image_size=224, out_features=STAGES, **TINY_SWIN)
    return Mask2FormerConfig(backbone_config=swin, num_labels=80, num_queries=12, **sizes, **depths)


def picture(width, height):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(7 * x + 3 * y) % 256, (x * x // 97 + 11 * y) % 256, ((13 * x) ^ (5 * y)) % 256], -1).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny checkpoint under OpenMMLab's names, its config, and the folder it was converted into."""
    answers("geneval_m2f.json")
    state = load_file(SHARED / "parity" / "m2f_tiny.safetensors")
    folder = tmp_path_factory.mktemp("detector")
    checkpoint.save(state, tiny_config(), folder, {"sha256": "of the source"})
    return state, folder


def test_parity_of_the_converted_network(tiny):
    official = answers("geneval_m2f.json")
    assert len(tiny[0]) == official["key_count"]
    model = checkpoint.load(tiny[1])
    for case in official["cases"]:
        y, x = np.mgrid[0 : case["height"], 0 : case["width"]].astype(np.float64)
        channels = [
            np.sin(0.13 * x + 0.07 * y * (c + 1) + c) * 1.5 + np.cos(0.31 * y - 0.05 * x * (c + 1)) for c in range(3)
        ]
        pixels = torch.from_numpy(np.stack(channels).round(4)).float()[None]
        with torch.inference_mode():
            output = model(pixel_values=pixels)
            stages = model.model.pixel_level_module.encoder(pixels).feature_maps
        torch.testing.assert_close(
            output.class_queries_logits[0], torch.tensor(case["class_logits"]), rtol=0, atol=1e-4
        )
        masks = output.masks_queries_logits[0]
        assert list(masks.shape) == case["mask_logits_shape"]
        for query, row, column, value in case["mask_samples"]:
            assert abs(masks[query, row, column].item() - value) < 1e-4
        assert masks.mean().item() == pytest.approx(case["mask_logits_mean"], abs=1e-4)
        assert [s.mean().item() for s in stages] == pytest.approx(case["backbone_stage_means"], abs=1e-4)
        assert [s.abs().mean().item() for s in stages] == pytest.approx(case["backbone_stage_abs_means"], abs=1e-4)


def test_keys_fit_exactly_or_the_checkpoint_is_refused(tiny, tmp_path):
    state, folder = tiny
    from transformers import Mask2FormerForUniversalSegmentation

    _, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    swin = "model.pixel_level_module.encoder.swin.layernorm."
    assert set(info["missing_keys"]) == {"criterion.empty_weight", f"{swin}weight", f"{swin}bias"}
    assert not info["unexpected_keys"]

    with pytest.raises(Flux2PixelError, match=r"roi_head\.weight: not a key"):
        checkpoint.convert(state | {"roi_head.weight": torch.zeros(1)})
    lost = "backbone.stages.2.blocks.1.attn.w_msa.qkv.weight"
    checkpoint.save({k: v for k, v in state.items() if k != lost}, tiny_config(), tmp_path, {})
    with pytest.raises(Flux2PixelError, match="3 missing keys"):
        checkpoint.load(tmp_path)
    with pytest.raises(UsageError, match="no converted detector"):
        checkpoint.load(tmp_path / "absent")


def test_parity_of_preprocessing():
    for case in answers("geneval_detector.json")["preprocess"]:
        prepared = preprocess(picture(case["width"], case["height"]))
        assert list(prepared.pixels.shape) == case["tensor_shape"]
        assert list(prepared.resized) == case["img_shape"] and list(prepared.original) == case["ori_shape"]
        assert list(prepared.pixels.shape[1:]) == case["pad_shape"]
        assert prepared.pixels.double().mean().item() == pytest.approx(case["mean"], abs=1e-5)
        assert prepared.pixels.double().std(correction=0).item() == pytest.approx(case["std"], abs=1e-5)
        for channel, row, column, value in case["samples"]:
            assert abs(prepared.pixels[channel, row, column].item() - value) < 1e-5


def test_parity_of_postprocessing():
    for case in answers("geneval_detector.json")["postprocess"]:
        pixels = torch.empty(3, *case["batch_input_shape"])
        prepared = Prepared(pixels, tuple(case["img_shape"]), tuple(case["ori_shape"]))
        logits = torch.tensor(case["mask_cls"]), torch.tensor(case["mask_pred_quarter_res"])
        found = postprocess(*logits, prepared)
        scores = found.scores.tolist()
        rows = list(
            zip(scores, found.labels.tolist(), found.boxes.tolist(), found.masks.sum((1, 2)).tolist(), strict=True)
        )
        rows.sort(key=lambda r: (-r[0], r[1], r[2]))
        assert len(rows) == len(case["detections"]) == 100
        for (score, label, box, area), expected in zip(rows, case["detections"], strict=True):
            assert (label, box, area) == (expected["label"], expected["box"], expected["area"])
            assert abs(score - expected["score"]) < 1e-6
        # Leaving out early what no threshold could pass changes nothing above it.
        floor = sorted(scores)[-10]
        early = postprocess(*logits, prepared, floor=floor)
        above, kept = found.scores > floor, early.scores > floor
        assert above.any() and torch.equal(early.scores[kept], found.scores[above])
        assert torch.equal(early.boxes[kept], found.boxes[above]) and torch.equal(early.masks[kept], found.masks[above])


def test_nothing_found_is_nothing():
    prepared = Prepared(torch.empty(3, 64, 64), (64, 64), (50, 40))
    none = torch.full((4, 81), -20.0)
    none[:, 80] = 20
    found = postprocess(none, torch.randn(4, 16, 16), prepared, floor=0.3)
    assert found.boxes.shape == (0, 4) and found.masks.shape == (0, 50, 40)


def test_an_empty_mask_has_a_box_of_zeros():
    prepared = Prepared(torch.empty(3, 32, 32), (32, 32), (32, 32))
    logits = torch.zeros(1, 81)
    logits[0, 3] = 9
    found = postprocess(logits, torch.full((1, 8, 8), -1.0), prepared, limit=1)
    assert found.boxes.tolist() == [[0, 0, 0, 0]] and found.scores.tolist() == [0]


def test_parity_of_crops():
    official = answers("geneval_color.json")
    width, height = official["image"]["width"], official["image"]["height"]
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(7 * x + 3 * y) % 256, (x * x // 9 + 11 * y) % 256, ((13 * x) ^ (5 * y)) % 256], -1)
    image = Image.fromarray(pixels.astype(np.uint8))
    transform = colors.clip_transform()
    for case in official["crops"]:
        x1, y1, x2, y2 = case["box"]
        mask = (x > x1) & (x < x2) & (y > y1) & (y < y2) & ((x + y) % 3 != 0)
        options = case["options"]
        background = options.get("bgcolor", colors.BACKGROUND)
        cut = colors.crop(
            image, case["box"], mask if case["has_mask"] else None, background, options.get("crop") != "0"
        )
        assert list(cut.size) == case["crop_size"]
        assert np.asarray(cut)[0].tolist() == case["crop_rgb_first_row"]
        assert int(np.asarray(cut, dtype=np.int64).sum()) == case["crop_rgb_sum"]
        seen = transform(cut)
        assert seen.shape == (3, 224, 224)
        for channel, row, column, value in case["clip_input_samples"]:
            assert abs(seen[channel, row, column].item() - value) < 1e-5


def test_parity_of_the_color_classifier():
    official = answers("geneval_color.json")["classifier"]
    assert colors.texts(official["classname"]) == official["texts_in_order"]
    features = torch.tensor([official["fake_text_features"][text] for text in official["texts_in_order"]])
    weights = colors.classifier_weights(features)
    torch.testing.assert_close(weights, torch.tensor(official["weights_8x10"]), rtol=0, atol=1e-4)
    logits = colors.color_logits(torch.tensor(official["image_features"]), weights)
    torch.testing.assert_close(logits, torch.tensor(official["logits"]), rtol=0, atol=1e-4)
    assert [COLORS[i] for i in logits.argmax(-1)] == official["argmax"]


class TinyClip(torch.nn.Module):
    """CLIP's interface on mean colours, so that its answer is known."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.image_size = (224, 224)
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def encode_text(self, tokens):
        palette = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}
        return torch.tensor([palette.get(COLORS[int(i)], (0.1, 0.1, 0.1)) for i in tokens], dtype=torch.float32)

    def encode_image(self, pixels):
        return pixels.mean((2, 3))


def tiny_tokenize(texts):
    return torch.tensor([next(i for i, c in enumerate(COLORS) if f"a {c}" in text) for text in texts])


def test_a_batch_of_mixed_sizes_scores_as_one_at_a_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(mask2former, "SHORT", 64)
    classifier = colors.ColorClassifier(TinyClip(), tiny_tokenize, {})
    red = np.zeros((60, 80, 3), np.uint8)
    red[10:40, 20:50, 0] = 255
    mask = red[..., 0] > 0
    assert classifier(red, "dog", [((20.0, 10.0, 50.0, 40.0), mask)]) == ["red"]

    detector = mask2former.Mask2Former(checkpoint.load(tiny[1]), classifier, checkpoint.source(tiny[1]), floor=0.0)
    images = [picture(48, 32), picture(32, 48), picture(96, 64)[::-1].copy()]
    together = detector.look(images)
    for image, seen in zip(images, together, strict=True):
        (alone,) = detector.look([image])
        assert seen.detections.keys() == alone.detections.keys() and sum(map(len, seen.detections.values())) == 100
        for name, found in seen.detections.items():
            assert set(seen.detections) <= set(CLASSES)
            np.testing.assert_allclose(found, alone.detections[name], atol=1e-4)
        name, found = next(iter(seen.detections.items()))
        assert set(seen.colors(name, [tuple(one[:4]) for one in found])) <= set(COLORS)

    rows = [
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}
    ]
    suite = GenEval(prompts(rows, 3), detector)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    samples = [Sample(suite.prompts[0], i, tmp_path / f"{i}.png") for i in range(3)]
    assert [r.index for r in suite.score(samples)] == [0, 1, 2]
    assert suite.provenance()["judge"] == "official"
    assert suite.provenance()["detector"]["weights"] == {"sha256": "of the source"}
