"""The stage: every family, every method, a kill and a resume, two processes, merged sums, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY, write_base
from PIL import Image
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.recipe import Recipe, load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.subspace.run import fit_subspace
from flux2pixel.subspace.strata import read_strata
from flux2pixel.weights.subspace import read_subspace

REPORT = [
    "subspace.json",
    "subspace.basis.png",
    "subspace.html",
    "subspace.moments.safetensors",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve noisy gradients of two sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(12):
        height, width = (40, 64) if index % 3 else (48, 48)
        smooth = np.linspace(*rng.uniform(0, 200, 2), width)[None, :, None] + rng.uniform(0, 40, (height, 1, 3))
        pixels = (smooth + rng.uniform(0, 15, (height, width, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a gradient")  # a training cache needs captions
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), "flux2-klein")


def recipe(base: Path, images: Path | str, *settings: str) -> Recipe:
    told = [f'base="{base}"', f'fit_subspace.source="{images}"', "threads=1", "fit_subspace.points=2"]
    told += ["fit_subspace.resolution=0", "fit_subspace.batch=250"]
    return load(None, told + [f"fit_subspace.{setting}" for setting in settings])


def sums(run: Path) -> torch.Tensor:
    return read_strata(run / "subspace.moments.safetensors")[0].subset(0).xz


def assert_same(run: Path, other: Path) -> None:
    assert (sums(run) - sums(other)).norm() < 1e-9 * sums(run).norm()
    first, second = (read_subspace(folder / "subspace.safetensors")[0] for folder in (run, other))
    assert (first.basis - second.basis).abs().max() < 1e-6
    assert float(first.scale) == pytest.approx(float(second.scale), rel=1e-6)


@pytest.mark.parametrize("family", ["flux2-klein", "flux1-dev", "qwen-image", "sd3.5-medium", "z-image"])
def test_every_kind_of_vae(family, photos, tmp_path):
    folder = write_base(tmp_path / "base", family)
    for settings in (['method="procrustes"'], ['method="vae-jacobian"']):
        path = fit_subspace(recipe(folder, photos, "images=3", *settings), tmp_path / "run")
        flow, metadata = read_subspace(path)
        assert flow.basis.shape == (3 * TINY[family].patch ** 2, 16) and metadata["images"] == "3"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted([*REPORT, "subspace.safetensors"])


@pytest.mark.parametrize(
    "settings",
    [
        ['method="pca"', "rank=5", "center=true"],
        ['method="random"'],
        ['method="vae-jacobian"', 'jacobian="exact"', "colour_stride=4"],
        ['method="vae-jacobian"', 'jacobian="stochastic"', "probes=2"],
        ['method="vae-jacobian"', 'jacobian="exact"', 'linearise_at="images"', "colour_stride=2", "resolution=16"],
    ],
)
def test_every_method_writes_basis_and_report(base, photos, tmp_path, settings):
    path = fit_subspace(recipe(base, photos, *settings), tmp_path)
    figures = json.loads((tmp_path / "subspace.json").read_text())
    assert figures["images"] == 12 and figures["recovery_identity_error"] < 1e-9
    assert (
        figures["verdict"].startswith("subspace: ")
        and len(figures["spectrum"]) == read_subspace(path)[0].basis.shape[0]
    )
    page = (tmp_path / "subspace.html").read_text()
    assert figures["verdict"].replace("'", "&#39;") in page and "http://" not in page and "https://" not in page


def test_a_good_residual_on_one_red_picture_is_no_good_basis(tmp_path):
    """One picture, a hundred of one kind, and a handful: none proves a basis, however well they are reconstructed."""
    for name, count in (("one", 1), ("many", 20)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (64, 64), (220, 20, 20)).save(tmp_path / name / f"{index}.png")
    for name, said in (("one", "1 image is too few"), ("many", "the images span")):
        fit_subspace(recipe("klein-tiny", tmp_path / name), tmp_path / "run")
        figures = json.loads((tmp_path / "run" / "subspace.json").read_text())
        assert figures["alignment_residual"] < 0.4
        assert "subspace: not proven: " in figures["verdict"] and said in figures["verdict"], figures["verdict"]
        assert "good" not in figures["verdict"] and "not proven" in (tmp_path / "run" / "subspace.html").read_text()
    fit_subspace(recipe("klein-tiny", "scenes", "images=200"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "subspace.json").read_text())["verdict"].startswith("subspace: good. ")


def test_scikit_learns_photographs(tmp_path):
    fit_subspace(recipe("klein-tiny", "photographs", "resolution=64"), tmp_path)
    figures = json.loads((tmp_path / "subspace.json").read_text())
    assert figures["alignment_residual"] < 0.3 and figures["captured_energy"] > 0.9


def test_batches_change_the_result_only_by_the_vaes_rounding(base, photos, tmp_path):
    # The sums of given tokens agree to 1e-12 (test_subspace); a float32 VAE itself rounds differently for one image.
    for batch in (1, 5):
        fit_subspace(recipe(base, photos, f"batch={batch}", "resolution=32"), tmp_path / str(batch))
    difference = (sums(tmp_path / "1") - sums(tmp_path / "5")).norm()
    assert difference < 1e-6 * sums(tmp_path / "1").norm()


KILLED = """
import os, sys
from pathlib import Path
from flux2pixel.recipe import load
from flux2pixel.subspace import gather
from flux2pixel.subspace import run as stage
gather.SAVE_SECONDS = 0
add, left = gather.Strata.add, 4
def some(*given):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    add(*given)
gather.Strata.add = some
stage.fit_subspace(load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_run_resumes_to_the_same_result(base, photos, tmp_path, capsys):
    from flux2pixel.recipe import dumps

    wanted = recipe(base, photos)
    (tmp_path / "recipe.toml").write_text(dumps(wanted))
    command = [sys.executable, "-c", KILLED, tmp_path / "recipe.toml", tmp_path / "killed"]
    assert subprocess.run(command, capture_output=True).returncode == 9
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["subspace.partial-0.safetensors"]
    fit_subspace(wanted, tmp_path / "killed")
    assert "resuming: 4 images" in capsys.readouterr().err.replace("\n", " ")
    fit_subspace(wanted, tmp_path / "whole")
    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*partial*"))


def test_unfinished_sums_of_other_settings_are_left_out(base, photos, tmp_path):
    from flux2pixel.recipe import dumps

    (tmp_path / "recipe.toml").write_text(dumps(recipe(base, photos, "images=10")))
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "recipe.toml", tmp_path / "run"], capture_output=True)
    assert list((tmp_path / "run").glob("*partial*"))
    fit_subspace(recipe(base, photos), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "subspace.json").read_text())["images"] == 12


def test_two_processes_equal_one(base, photos, tmp_path):
    words = [sys.executable, "-m", "flux2pixel", "fit-subspace", "--base", base, "--images", photos]
    words += ["--set", "threads=1", "--set", "fit_subspace.resolution=0", "--set", "fit_subspace.batch=250"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words += ["--gpus", "2", "--run", tmp_path / "two"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    fit_subspace(recipe(base, photos), tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")
    assert json.loads((tmp_path / "two" / "subspace.json").read_text())["source"]["used"] == 12


def test_merged_sums_equal_one_fit(base, photos, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    for index, part in enumerate(parts):
        part.mkdir()
        for file in photos.glob("*.png"):
            if int(file.stem) % 2 == index:
                (part / file.name).write_bytes(file.read_bytes())
        fit_subspace(recipe(base, part), tmp_path / f"run-{part.name}")
    merge = [tmp_path / f"run-{part.name}" / "subspace.moments.safetensors" for part in parts]
    fit_subspace(recipe(base, "absent"), tmp_path / "merged", merge=merge)
    fit_subspace(recipe(base, photos), tmp_path / "whole")
    assert_same(tmp_path / "merged", tmp_path / "whole")
    with pytest.raises(UsageError, match="another VAE"):
        fit_subspace(recipe("klein-tiny", "absent"), tmp_path / "other", merge=merge)


def test_broken_images_are_counted_listed_and_limited(base, photos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in photos.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "cut.png").write_bytes((photos / "1.png").read_bytes()[:400])
    (folder / "text.jpg").write_text("not a picture")
    Image.new("RGB", (3, 3)).save(folder / "dot.png")
    fit_subspace(recipe(base, folder), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "subspace.json").read_text())["source"]
    assert {name for name, _ in found["broken"]} == {"cut.png", "text.jpg"} and found["used"] == 12
    assert [name for name, _ in found["dropped"]] == ["dot.png"]
    assert "text.jpg" in (tmp_path / "run" / "subspace.html").read_text()
    with pytest.raises(Flux2PixelError, match=r"2 of .* images are unreadable, more than the 1 allowed"):
        fit_subspace(recipe(base, folder, "max_broken=1"), tmp_path / "limited")
    assert not (tmp_path / "limited" / "subspace.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rank=3"], "rank: 3 is not the latent token width"),
        (['method="pca"', "rank=49"], "rank: 49 is more than a pixel token has"),
        (["resolution=30"], "not a multiple of the patch size"),
        (['method="vae-jacobian"', 'linearise_at="images"'], "smoothed over images is what procrustes computes"),
    ],
)
def test_settings_that_cannot_be_are_refused(base, photos, tmp_path, settings, said):
    with pytest.raises(UsageError, match=said):
        fit_subspace(recipe(base, photos, *settings), tmp_path)


def test_a_vae_that_gives_nan_is_named(photos, tmp_path):
    folder = write_base(tmp_path / "base", "flux2-klein")
    from safetensors.torch import load_file, save_file

    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["encoder.conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(Flux2PixelError, match=r"\.png.*not finite"):
        fit_subspace(recipe(folder, photos), tmp_path / "run")


def test_the_references_file_goes_in_and_out(base, photos, tmp_path):
    path = fit_subspace(recipe(base, photos), tmp_path)

    def run(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    assert run("export-subspace", path, tmp_path / "a.pth").exit_code == 0
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert sorted(content) == ["proj_mat_p4", "scale_p4"] and content["proj_mat_p4"].dtype == torch.float32
    assert run("export-subspace", tmp_path / "a.pth", tmp_path / "b.safetensors").exit_code == 0
    ours, back = read_subspace(path)[0], read_subspace(tmp_path / "b.safetensors")[0]
    assert torch.equal(ours.basis, back.basis) and torch.equal(ours.scale, back.scale)
    same = run("compare", path, tmp_path / "a.pth")
    assert float(same.stdout.split("largest ")[1].split()[0]) < 1e-5
    assert "ratio 1\n" in same.stdout and "mean 1.0000" in same.stdout
    told = run("inspect", tmp_path / "a.pth").stdout
    assert "subspace of the reference implementation" in told and "basis: (48, 16)" in told
    torch.save({"weight": torch.ones(3)}, tmp_path / "c.pth")
    assert "no subspace in it" in run("compare", path, tmp_path / "c.pth").stderr
    torch.save({"proj_mat_p4": os.system}, tmp_path / "evil.pth")
    refused = run("compare", path, tmp_path / "evil.pth")
    assert refused.exit_code == 1 and "not a torch file of plain tensors" in refused.stderr
    assert run("export-subspace", path, tmp_path / "a.txt").exit_code == 2


def test_a_training_cache_is_a_source(photos, tmp_path):
    from flux2pixel.data import encode
    from flux2pixel.models import base as bases

    wanted = [f'data.source="{photos}"', "finetune.images=0", "data.resolution=32", 'data.dtype="fp32"', "threads=1"]
    encode.make(load(None, wanted), tmp_path, bases.open_base("klein-tiny"))
    cache = encode.cache_folder(load(None, wanted), tmp_path)
    fit_subspace(recipe("klein-tiny", cache), tmp_path / "cached")
    fit_subspace(recipe("klein-tiny", photos, "resolution=32"), tmp_path / "read")
    images = [json.loads((tmp_path / run / "subspace.json").read_text())["images"] for run in ("cached", "read")]
    assert images == [12, 12]
    assert (sums(tmp_path / "cached") - sums(tmp_path / "read")).norm() < 1e-6 * sums(tmp_path / "read").norm()
    other = write_base(tmp_path / "base", "flux2-klein")
    with pytest.raises(UsageError, match="a cache of another VAE"):
        fit_subspace(recipe(other, cache), tmp_path / "other")
