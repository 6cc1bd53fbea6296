"""The fit-readout command: what it fits, what it writes, that it adds up and goes on, and what it refuses."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from flux2pixel.asymflow.readout import Readout
from flux2pixel.asymflow.solvers import sample
from flux2pixel.asymflow.tokens import unpatchify
from flux2pixel.cli.app import app
from flux2pixel.convert.run import convert
from flux2pixel.models.folder import read_folder
from flux2pixel.models.model import open_model
from flux2pixel.readout import gather as gathering
from flux2pixel.readout.run import SUMS, fit_readout
from flux2pixel.readout.solve import transport
from flux2pixel.readout.sums import Gram, read_sums
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import UsageError
from flux2pixel.subspace.solvers import polar
from flux2pixel.weights.subspace import write_subspace

SMALL = [
    "base=klein-tiny",
    "readout.source=scenes",
    "readout.images=96",
    "readout.window=1",
    "readout.precision=fp32",
]
EXACT = [*SMALL, "readout.images=48", "readout.precision=fp64"]  # every image by itself: no rounding of a batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose miniature was converted through a random basis."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    basis = polar(torch.randn(192, 16, dtype=torch.float64))
    write_subspace(folder / "subspace.safetensors", basis, torch.tensor(1.7), {"method": "random"})
    convert(load(None, ["base=klein-tiny", "convert.verify_steps=1", "convert.dtype=fp32"]), folder)
    return folder


@pytest.fixture(scope="module")
def read_out(run):
    return fit_readout(load(None, SMALL), run)


@pytest.fixture(scope="module")
def exact(run, tmp_path_factory):
    """The sums of a fit in float64."""
    return read_sums(fit_readout(load(None, EXACT), run, out=tmp_path_factory.mktemp("exact") / "readout") / SUMS)[0]


def draw(folder, steps=4):
    model = open_model(folder)
    text, empty = model.text(["a photo of a red circle"]), model.text([""])
    return model(text, empty, model.noise([(0, 0)], model.size), model.size)


def largest_difference(one, other):
    """Relative difference of two sets of sums."""
    assert one.grams.keys() == other.grams.keys()
    pairs = [(one.grams[name].upper, other.grams[name].upper) for name in one.grams]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def test_a_folder_with_every_part_draws_another_picture(run, read_out):
    stored = read_folder(read_out)
    readout = Readout.from_tensors(stored.flow.basis, stored.tensors)
    assert readout.last.shape == (192 + 16 + 1, 192) and readout.variance.min() > 0
    assert stored.codec.offset.shape == (192,)
    drawn, plain = draw(read_out), draw(run / "converted")
    assert drawn.shape == plain.shape and (drawn - plain).abs().max() > 0.05
    record = json.loads((read_out / "readout.json").read_text())
    errors = {row["what"]: row["error"] for row in record["ladder"]}
    assert errors["+ last step"] < errors["+ head"] < errors["+ offset"] < errors["subspace alone"]
    assert errors["any linear map of the features"] <= 1.05 * errors["+ last step"]
    assert record["images"] == 96 and 0 < record["held_out_images"] < 40
    assert "| + last step |" in (read_out / "readout.md").read_text()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_travelling_pipeline_draws_every_part(read_out, tmp_path, monkeypatch, guidance):
    """The folder's own code, and a folder that it saved, against flux2pixel's drawing, all in float32."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())
    model = open_model(read_out, load(None, [f"sample.guidance={guidance}"]).sample)
    text, empty = model.text(["a photo of a red circle"]), model.text([""])
    noise = model.noise([(0, 0)], model.size)
    ours = model(text, empty, noise, model.size)
    call = {"prompt": "a photo of a red circle", "guidance_scale": guidance, "output_type": "pt"}
    call["latents"] = unpatchify(noise, 8, *model.size)
    pipe = DiffusionPipeline.from_pretrained(read_out, trust_remote_code=True, dtype=torch.float32)
    assert pipe.readout.last is not None and pipe.readout.variance is not None
    assert (pipe(**call).images - ours).abs().max() < 1e-3
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype=torch.float32)
    assert (again(**call).images - ours).abs().max() < 1e-3


def test_the_head_alone_is_a_stock_model(run, tmp_path):
    folder = fit_readout(load(None, [*SMALL, 'readout.parts=["head"]']), run, out=tmp_path / "head")
    ours, theirs = ((path / "transformer").glob("*.safetensors") for path in (folder, run / "converted"))
    from safetensors.torch import load_file

    ours, theirs = ({k: v for file in files for k, v in load_file(file).items()} for files in (ours, theirs))
    changed = [name for name in ours if not ours[name].equal(theirs[name])]
    assert changed == ["proj_out.weight"]
    basis = read_folder(folder).flow.basis
    assert (basis.mT @ (ours[changed[0]] - theirs[changed[0]])).abs().max() < 1e-5, "it says nothing in the subspace"
    stored = read_folder(folder)
    assert stored.tensors.keys() == {"basis", "scale"} and stored.codec.offset is None


def test_unchanged_weights_are_shared(run, read_out):
    name = "text_encoder/model.safetensors"
    assert (read_out / name).samefile(run / "converted" / name)
    weights = next((run / "converted" / "transformer").glob("*.safetensors"))
    assert not (read_out / "transformer" / weights.name).samefile(weights)


def test_sums_do_not_depend_on_batches(run, exact, tmp_path):
    other = fit_readout(load(None, [*EXACT, "readout.batch=7"]), run, out=tmp_path / "batches")
    assert largest_difference(exact, read_sums(other / SUMS)[0]) < 1e-9


def test_sums_of_several_fits_are_merged(run, read_out, tmp_path):
    half = fit_readout(load(None, [*SMALL, "readout.images=64"]), run, out=tmp_path / "half")
    with pytest.raises(UsageError, match=r"sums of neighbourhoods of 1, not of readout\.window 3"):
        fit_readout(load(None, [*SMALL, "readout.window=3"]), run, out=tmp_path / "no", merge=[half / SUMS])
    merged = fit_readout(load(None, SMALL), run, out=tmp_path / "merged", merge=[read_out / SUMS, half / SUMS])
    assert read_sums(merged / SUMS)[0].images == 160


def test_two_processes_make_the_sums_of_one(run, exact, tmp_path, monkeypatch):
    parts, shared = [], gathering.batches
    for rank in (0, 1):
        team = gathering.Team(rank)
        recipe = load(None, EXACT)
        from flux2pixel.readout import run as stage

        observer = stage.observe(recipe, run / "converted", stage.check(recipe, run / "converted"), team.device)
        place = gathering.Team(rank, 2)
        monkeypatch.setattr(gathering, "batches", lambda r, b, s, t, _, d, p=place: shared(r, b, s, t, p, d))
        parts.append(gathering.gather(observer, team, tmp_path / f"part{rank}", 1)[0])
        monkeypatch.undo()
    assert largest_difference(exact, parts[0] + parts[1]) < 1e-9


def test_a_killed_fit_goes_on(run, exact, tmp_path, monkeypatch, capsys):
    recipe, out, seen = load(None, [*EXACT, "readout.batch=8"]), tmp_path / "killed", []
    add = gathering.Observer.add

    def dying(self, sums, images):
        if len(images.digests) > 1:
            seen.append(len(images.digests))
            if len(seen) == 4:
                raise KeyboardInterrupt
        add(self, sums, images)

    monkeypatch.setattr(gathering, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(gathering.Observer, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        fit_readout(recipe, run, out=out)
    assert not out.exists() and len(list(tmp_path.glob("killed.partial-*"))) == 1
    seen.clear()
    seen += [0] * 4
    fit_readout(recipe, run, out=out)
    assert "resuming: 24 images are in the sums already" in capsys.readouterr().err
    assert sum(seen) == 24 and not list(tmp_path.glob("killed.partial-*"))
    assert largest_difference(exact, read_sums(out / SUMS)[0]) < 1e-9


def test_without_images_the_base_draws_its_own(run, tmp_path):
    settings = [*SMALL, "readout.source=", "readout.images=40", 'readout.parts=["head","offset"]']
    folder = fit_readout(load(None, settings), run, out=tmp_path / "own")
    assert json.loads((folder / "readout.json").read_text())["images"] == 40


def cli(*words):
    return CliRunner().invoke(app, ["fit-readout", *map(str, words)])


def test_bad_input_gets_one_line(run, read_out, tmp_path):
    small = [word for setting in SMALL for word in ("--set", setting)]

    def refused(*words):
        result = cli("--run", run, "--out", tmp_path / "out", *small, *words)
        assert result.exit_code == 2, result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and result.stderr.count("error: ") == 1
        return last

    assert "already has a readout; name the converted folder" in refused("--model", read_out)
    assert "must be one of head, offset, prior, last" in refused("--part", "tail")
    assert "no such file; give the sums.safetensors" in refused("--merge", tmp_path / "none")
    assert "not a converted model; run flux2pixel convert first" in refused("--model", tmp_path)
    assert "no such image source" in refused("--images", tmp_path / "none")
    other = tmp_path / "other"
    shutil.copytree(run / "converted", other)
    use = json.loads((other / "asymflow.json").read_text()) | {"base": "klein-9b"}
    (other / "asymflow.json").write_text(json.dumps(use))
    assert "was converted from base 'klein-9b'" in refused("--model", other)
    assert "are too few" in refused("--set", "readout.images=1")
    assert "tokens to fit 1881 features on; give at least" in refused("--set", "readout.window=3")
    assert not list(tmp_path.glob("out*")), "nothing is left behind"


def test_the_plan_counts_before_anything_runs(run):
    result = cli("--run", run, "--dry-run")
    assert result.exit_code == 0 and "1881 features: 3 x 3" in result.stdout and "on one H100" in result.stdout


def test_the_prior_is_the_gaussian_posterior_and_ends_in_a_sample():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    basis, directions = axes[:, :4], axes[:, 4:]
    variance = torch.linspace(0.05, 2, 8, dtype=torch.float64)
    readout = Readout(basis, directions, variance)
    m = torch.randn(1, 1, 12, dtype=torch.float64, generator=generator) @ directions @ directions.mT
    x = torch.randn(1, 1, 12, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.3], dtype=torch.float64)
    cov = directions @ torch.diag(variance) @ directions.mT
    seen = 0.49 * cov + 0.09 * torch.eye(12, dtype=torch.float64)
    wanted = m + (x - 0.7 * m) @ torch.linalg.solve(seen, 0.7 * cov)
    assert torch.allclose(readout.prior(m, x, sigma), wanted)
    assert readout.prior(m, x, sigma)[0, 0] @ basis == pytest.approx((m[0, 0] @ basis).numpy(), abs=1e-12)
    refine = readout.bind((1, 1), lambda count: None)
    noise = torch.randn(10_000, 1, 12, dtype=torch.float64, generator=generator)
    levels = torch.linspace(1, 0, 257, dtype=torch.float64)  # Euler's own error falls with the step
    drawn = sample(lambda x, sigma, final: refine(m.expand_as(x), x, sigma.expand(len(x)), final), noise, levels)
    found = ((drawn - m)[:, 0] @ directions).var(0)
    assert (found / variance - 1).abs().max() < 0.06


def test_transport_takes_one_covariance_to_another():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    target = root @ root.mT
    directions = torch.linalg.qr(torch.randn(12, 8, dtype=torch.float64, generator=generator))[0]
    variance = torch.linspace(0.1, 2, 8, dtype=torch.float64)
    moved = transport(directions, variance, target)
    found = moved.mT @ torch.diag(variance) @ moved
    within = directions.mT @ target
    assert torch.allclose(directions.mT @ found, within, atol=1e-6)
    same = directions @ torch.diag(variance) @ directions.mT
    assert torch.allclose(transport(directions, variance, same), directions.mT, atol=1e-6)


def test_a_gram_is_the_product_of_its_rows_in_either_precision():
    generator = torch.Generator().manual_seed(2)
    for tokens in (16, 300):
        a, b = (torch.randn(3, tokens, width, generator=generator) for width in (5, 2))
        gram = Gram.zeros((("a", 5), ("b", 2)))
        gram.add(a, b)
        rows = torch.cat([a, b], -1).double().flatten(0, 1)
        assert torch.allclose(gram.get("a", "b"), rows[:, :5].mT @ rows[:, 5:], atol=1e-3)
        assert torch.allclose(gram.get("b", "a"), gram.get("a", "b").mT)
        assert torch.allclose(gram.get("a", "a"), rows[:, :5].mT @ rows[:, :5], atol=1e-3)
        assert (gram.tokens, gram.images) == (3 * tokens, 3)
    with pytest.raises(ValueError, match="are not"):
        gram.add(b, a)
