"""Fidelity to a folder of true images: streamed measures, networks from local weights, and the CLI on any base."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_fidelity import blurred, textured
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.evaluate.assets import fetch
from flux2pixel.evaluate.fidelity import distances as features
from flux2pixel.evaluate.fidelity import measures, networks
from flux2pixel.evaluate.fidelity.networks import Networks
from flux2pixel.evaluate.fidelity.truth import CROP, TrueImages, TrueSet, crops
from flux2pixel.evaluate.suite import Prompt, Sample
from flux2pixel.models.base import resolve
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.subspace.run import fit_subspace

CPU = torch.device("cpu")


def tiny_features(images: Any) -> np.ndarray:
    """A random convolution and its mean and deviation: stands for Inception."""
    weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255
    seen = torch.nn.functional.conv2d(pixels, weight).flatten(2)
    return torch.cat([seen.mean(2), seen.std(2)], 1).numpy()


def written(folder: Path, images: np.ndarray) -> list[Sample]:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    prompt = Prompt("00000", "a red circle", "tag", 4)
    return [Sample(prompt, number, folder / f"{number:03d}.png") for number in range(len(images))]


def test_large_images_give_patches_on_and_off_the_grid_alike() -> None:
    image = np.random.default_rng(0).integers(0, 256, (528, 520, 3)).astype(np.uint8)
    one = measures.summarise([image], 16)
    windows = np.lib.stride_tricks.sliding_window_view(image / 255, (16, 16), axis=(0, 1))
    rows = windows[::24, ::24].reshape(-1, 768)
    np.testing.assert_allclose(one.patches[:768], rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(one.patches[768:], (rows.T @ rows / len(rows)).ravel(), rtol=1e-12)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    images = textured(3)
    with pytest.raises(ValueError, match="differ in size"):
        measures.summarise([images[0], images[1][:16]], 8)
    with pytest.raises(ValueError, match="cannot be compared"):
        measures.measure(measures.summarise(images, 8), measures.summarise(images[:, :16, :16], 8))


def test_a_reference_is_cut_to_size_and_small_or_broken_images_are_left_out(tmp_path: Path) -> None:
    written(tmp_path / "true", np.stack([np.full((40, 64, 3), level, np.uint8) for level in (10, 90)]))
    Image.new("RGB", (31, 64)).save(tmp_path / "true" / "small.png")
    (tmp_path / "true" / "zz.png").write_bytes(b"no picture")
    images = TrueImages(str(tmp_path / "true"), 8, (32, 32))
    assert [image.shape for image in images] == [(32, 32, 3)] * 2 and len(images.digest) == 64
    assert images.digest != TrueImages(str(tmp_path / "true"), 8, (16, 16)).digest
    with pytest.raises(UsageError, match=r"holds 0 readable images of at least 128x128 pixels"):
        _ = TrueImages(str(tmp_path / "true"), 8, (128, 128)).digest
    with pytest.raises(UsageError, match="no such image source"):
        TrueImages(str(tmp_path / "absent"), 8, (32, 32))


def test_crops_are_inceptions_own_size_and_fixed_by_the_seed() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1024, 768, 3), dtype=np.uint8)
    first, again, other = crops(image, 1), crops(image, 1), crops(image, 2)
    assert {part.shape for part in first} == {(CROP, CROP, 3)}
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_the_set_measures_are_those_of_the_features(tmp_path: Path) -> None:
    sharp, soft, true = textured(24, 1), blurred(textured(24, 1)), textured(24, 2)
    written(tmp_path / "true", true)
    samples = written(tmp_path / "sharp", sharp), written(tmp_path / "soft", soft)
    opened = Networks(tiny_features, lambda images, prompts: [20.0] * len(images), lambda a, b: [0.5] * len(a))
    truth = TrueSet(TrueImages(str(tmp_path / "true"), 24, (32, 32)), 8, lambda: opened)
    clear, blur = (truth.measure(name, some, samples[0]) for name, some in zip("ab", samples, strict=True))
    assert clear["inception_fid"] == pytest.approx(features.fid(tiny_features(sharp), tiny_features(true)), rel=1e-9)
    assert clear["inception_kid"] == pytest.approx(features.kid(tiny_features(sharp), tiny_features(true)), rel=1e-9)
    parts = [[c for i, image in enumerate(some) for c in crops(image, i)] for some in (sharp, true)]
    assert clear["patch_fid"] == pytest.approx(features.fid(*map(tiny_features, parts)), rel=1e-9)
    assert blur["inception_fid"] > 2 * clear["inception_fid"] and blur["patch_fid"] > 2 * clear["patch_fid"]
    assert blur["spectrum_high"] < -0.5 and blur["clip_score"] == 20 and blur["lpips_to_first"] == 0.5
    assert clear["psnr_to_first"] == 100 and blur["psnr_to_first"] == pytest.approx(
        np.mean([features.psnr(a, b) for a, b in zip(soft, sharp, strict=True)])
    )
    ceilings = truth.ceilings(lambda images: images)
    assert ceilings["vae"]["inception_fid"] == pytest.approx(0, abs=1e-6)
    assert ceilings["vae"]["psnr_reconstruction"] == 100 and ceilings["real"] == measures.absolute(
        measures.summarise(true, 8)
    )
    weightless = TrueSet(TrueImages(str(tmp_path / "true"), 24, (32, 32)), 8, Networks).measure("a", samples[0])
    assert not {"inception_fid", "clip_score"} & weightless.keys() and weightless["grain"] == clear["grain"]


def test_absent_weights_say_what_to_fetch(tmp_path: Path) -> None:
    lines = networks.absent(tmp_path)
    assert set(lines) == {"inception", "clip", "lpips"}
    assert all(str(tmp_path) in line and "--suite fidelity --fetch" in line for line in lines.values())
    assert networks.open_networks(tmp_path, CPU) == Networks()
    (tmp_path / "fidelity").mkdir()
    (tmp_path / fetch.INCEPTION_FILE).write_bytes(b"other")
    with pytest.raises(Flux2PixelError, match=r"sha256 .*want 6726825d"):
        networks.open_networks(tmp_path, CPU)


def test_inception_is_torch_fidelitys_from_the_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with monkeypatch.context() as without:
        without.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        without.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        peer = module.FeatureExtractorInceptionV3("inception", ["2048"])
    (tmp_path / "fidelity").mkdir()
    torch.save(peer.state_dict(), tmp_path / fetch.INCEPTION_FILE)
    monkeypatch.setattr(networks, "checked", lambda path, source: path)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    found = networks.Inception(tmp_path, CPU)(list(images))
    expected = peer(torch.from_numpy(images).permute(0, 3, 1, 2))[0].double().numpy()
    assert found.shape == (2, 2048) and np.array_equal(found, expected)


def test_lpips_takes_its_trunk_from_the_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = pytest.importorskip("lpips")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    trunk = alexnet()
    (tmp_path / "fidelity").mkdir()
    torch.save(trunk.state_dict(), tmp_path / fetch.ALEXNET_FILE)
    monkeypatch.setattr(networks, "checked", lambda path, source: path)
    monkeypatch.setattr(lpips.pretrained_networks.tv, "alexnet", lambda pretrained: trunk)
    peer = lpips.LPIPS(net="alex", verbose=False)
    monkeypatch.undo()
    monkeypatch.setattr(networks, "checked", lambda path, source: path)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    ours = networks.Lpips(tmp_path, CPU)
    a, b = (torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1 for part in (images[:2], images[2:]))
    assert ours(list(images[:2]), list(images[2:])) == pytest.approx(peer(a, b).flatten().tolist(), rel=1e-5)
    assert ours(list(images[:2]), list(images[:2])) == [0.0, 0.0]


def test_the_clip_score_is_the_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open_clip.get_model_config("ViT-L-14-quickgelu")
    full["vision_cfg"] |= {"layers": 1, "width": 64}
    full["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    full["embed_dim"] = 16
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14-quickgelu", full)
    torch.manual_seed(1)
    model = open_clip.create_model("ViT-L-14-quickgelu", load_weights=False).eval()
    (tmp_path / "geneval").mkdir()
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "attn_mask"}
    save_file(state, tmp_path / fetch.CLIP_FILE)
    images = list(np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8))
    prompts = ["a red circle", "two blue squares", "a dog"]
    found = networks.ClipScore(tmp_path, CPU)(images, prompts)
    tokenize, transform = open_clip.get_tokenizer("ViT-L-14-quickgelu"), networks.ClipScore(tmp_path, CPU)._transform
    with torch.inference_mode():
        for score, image, prompt in zip(found, images, prompts, strict=True):
            x, y = (
                model.encode_image(transform(Image.fromarray(image))[None])[0],
                model.encode_text(tokenize(prompt))[0],
            )
            assert score == pytest.approx(max(0.0, float(100 * x @ y / (x.norm() * y.norm()))), abs=1e-3)


def test_fidelity_alone_on_any_base_with_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniature's folder under another name than its alias is a base like any other."""
    base = str(resolve("klein-tiny"))
    fit_subspace(load(None, ["fit_subspace.images=300", f"base={base}"]), tmp_path / "run")
    written(tmp_path / "true", textured(8))
    words = ["eval", "--base", base, "--run", str(tmp_path / "run"), "--suite", "fidelity"]
    for setting in ("size=32", "prompts=4", "samples=1", "fidelity_images=8", f"assets={tmp_path / 'assets'}"):
        words += ["--set", f"eval.{setting}"]
    words += ["--set", "sample.steps=1", "--set", "threads=1"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "--reference" in refused.stderr
    done = CliRunner().invoke(app, [*words, "--reference", str(tmp_path / "true")])
    assert done.exit_code == 0, done.output
    assert "FID, KID, precision, recall and patch-FID: no" in done.stderr + done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"texture_frechet", "spectrum_all", "blockiness", "colour_mean_error"} <= report["models"]["base"][
        "fidelity"
    ].keys()
    assert report["fidelity_ceiling"]["vae"]["psnr_reconstruction"] > 10
    assert report["fidelity_reference"]["patch"] == 8 and len(report["fidelity_reference"]["absent"]) == 3
    assert "geneval" not in report["models"]["base"]
    assert "Fidelity to true images" in (tmp_path / "run" / "report.html").read_text()

    def never(*_: Any) -> None:
        raise AssertionError("a set was measured again")

    monkeypatch.setattr(TrueSet, "_read", never)
    again = CliRunner().invoke(app, [*words, "--reference", str(tmp_path / "true")])
    assert again.exit_code == 0, again.output
    moved = CliRunner().invoke(app, [*words, "--reference", str(tmp_path / "absent")])
    assert moved.exit_code == 2 and "no such image source" in moved.stderr
