"""The training cache, its order and its loader: resumed after a kill, equal for any number of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flux2pixel.asymflow import color, tokens
from flux2pixel.cli import app
from flux2pixel.data import encode
from flux2pixel.data.cache import Cache, Shards
from flux2pixel.finetune.data.loader import Loader
from flux2pixel.finetune.data.order import Order, units_of
from flux2pixel.models import base as bases
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError


@pytest.fixture(scope="module")
def base():
    return bases.open_base("klein-tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty captioned pictures of three shapes; two captions occur often, one picture twice, three are bad."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(30):
        size = ((40, 40, 3), (36, 60, 3), (60, 40, 3))[index % 3]
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / f"{index:02}.png")
        (root / f"{index:02}.txt").write_text(["a red circle", "two squares", f"picture {index}"][index % 3])
    shutil.copy(root / "05.png", root / "05b.png")
    shutil.copy(root / "05.txt", root / "05b.txt")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (20, 20)).save(root / "tiny.png")
    (root / "tiny.txt").write_text("small")
    Image.new("RGB", (40, 40)).save(root / "silent.png")
    return root


def recipe_of(photos, *more):
    return load(None, [f'data.source="{photos}"', "finetune.images=0", "data.batch=4", "threads=1", *more])


@pytest.fixture(scope="module")
def made(photos, base, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return encode.make(recipe_of(photos), run, base)


def everything(cache: Cache):
    """All tensors of a cache, by name."""
    found = {}
    for bucket, count in enumerate(cache.counts):
        batch = cache.load(bucket, range(count))
        for row, name in enumerate(batch.names):
            found[name] = (batch.rgb[row], batch.latents[row], batch.conditioning["text"][row])
    return found


def test_a_cache_holds_what_the_encoders_give(made, base, photos):
    assert len(made) == 30 and sorted(made.counts) == [10, 10, 10]
    assert set(made.buckets) == {(32, 32), (24, 40), (40, 24)}
    for bucket, size in enumerate(made.buckets):
        batch = made.load(bucket, [3, 0])
        assert batch.rgb.shape == (2, 3, *size) and batch.rgb.dtype == torch.uint8
        assert batch.grid == (size[0] // 8, size[1] // 8)
        rgb = batch.rgb.float() / 255
        assert torch.equal(batch.pixels(), tokens.patchify(color.encode(rgb), 8))
        assert torch.allclose(batch.latents.float(), base.encode(rgb), atol=4e-3, rtol=1e-3)
        captions = [(photos / name).with_suffix(".txt").read_text() for name in batch.names]
        assert torch.allclose(batch.conditioning["text"].float(), base.text(captions)["text"], atol=4e-3, rtol=1e-3)


def test_dropped_captions_become_the_empty_one(made, base):
    batch = made.load(0, [0, 1, 2], np.array([True, False, True]))
    whole, empty = made.load(0, [0, 1, 2]), made.empty()["text"][0]
    assert torch.equal(batch.conditioning["text"][0], empty) and torch.equal(batch.conditioning["text"][2], empty)
    assert torch.equal(batch.conditioning["text"][1], whole.conditioning["text"][1])
    assert torch.allclose(empty.float(), base.text([""])["text"][0], atol=4e-3, rtol=1e-3)


def test_what_is_left_out_is_on_record(made):
    manifest = json.loads((made.folder / "cache.json").read_text())
    assert [name for name, _ in manifest["images"]["broken"]] == ["broken.png", "silent.png"]
    assert [name for name, _ in manifest["images"]["dropped"]] == ["tiny.png"]
    assert manifest["items"] == 30 and manifest["repeated"] == 1 and sum(manifest["buckets"].values()) == 30
    # Each caption is stored once: two shared ones, ten of their own, the empty one, and the three sample prompts.
    assert len(Shards(made.folder / "text").rows) == 13 + 3


def test_two_processes_make_the_same_cache(made, photos, base, tmp_path):
    two = encode.make(recipe_of(photos), tmp_path, base, gpus=2)
    assert two.digest == made.digest and two.counts == made.counts and two.buckets == made.buckets
    first, second = everything(made), everything(two)
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        assert torch.equal(tensors[0], second[name][0])
        for one, other in zip(tensors[1:], second[name][1:], strict=True):
            # The encoders see other batches, which may round the last bit another way.
            assert torch.allclose(one.float(), other.float(), atol=2e-3, rtol=1e-3)


def test_a_failure_in_one_process_is_the_commands(photos, base, tmp_path):
    with pytest.raises(Flux2PixelError, match=r"unreadable, more than the 0 allowed"):
        encode.make(recipe_of(photos, "data.max_broken=0"), tmp_path, base, gpus=2)
    assert not (tmp_path / "cache" / "cache.json").exists()
    with pytest.raises(UsageError, match="no finished cache"):
        Cache(tmp_path / "cache")


def test_more_broken_pictures_than_allowed_in_all_processes_together(photos, base, tmp_path, monkeypatch):
    """One in each part passes each process's own count; their sum does not pass."""

    def here(recipe, folder, base, world, advance):
        return [
            encode.make_part(recipe, folder, bases.open_base(base.folder), rank, world, advance)
            for rank in range(world)
        ]

    monkeypatch.setattr(encode, "_run_parts", here)
    with pytest.raises(Flux2PixelError, match=r"2 images are unreadable, more than data\.max_broken 1"):
        encode.make(recipe_of(photos, "data.max_broken=1"), tmp_path, base, gpus=2)


KILLED = """
import sys
from flux2pixel.data import encode
encode.SHARD_ROWS = 8
from flux2pixel.cli import main
main()
"""


def test_killed_and_started_again_it_goes_on(made, photos, base, tmp_path, monkeypatch):
    words = ["cache", "--run", str(tmp_path), "--source", str(photos), "--images", "0", "--set", "data.batch=4"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    images = tmp_path / "cache" / "images"
    while not list(images.glob("*.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    kept = {path.name: path.stat().st_mtime_ns for path in images.glob("*.safetensors")}
    assert kept and not (tmp_path / "cache" / "cache.json").exists()
    (images / "left.safetensors.tmp").write_bytes(b"half")
    seen = []
    encoded = base.encode
    monkeypatch.setattr(base, "encode", lambda rgb: (seen.append(len(rgb)), encoded(rgb))[1])
    recipe = load(None, [f"data.source={photos}", "finetune.images=0", "data.batch=4"])
    resumed = encode.make(recipe, tmp_path, base)
    assert sum(seen) == 30 - sum(_rows(images / name) for name in kept)
    assert {name: (images / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(images.glob("*.tmp"))
    assert resumed.digest == made.digest and everything(resumed).keys() == everything(made).keys()
    seen.clear()
    assert encode.ensure(recipe, tmp_path, base).digest == made.digest and not seen


def _rows(shard):
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        return sum(map(len, json.loads(file.metadata()["digests"]).values()))


def test_new_pictures_are_added_and_old_ones_not_encoded_again(photos, base, tmp_path, monkeypatch):
    grown = tmp_path / "photos"
    shutil.copytree(photos, grown)
    first = encode.make(recipe_of(grown), tmp_path, base)
    Image.fromarray(np.full((40, 40, 3), 77, np.uint8)).save(grown / "new.png")
    (grown / "new.txt").write_text("something new")
    (grown / "00.png").unlink()
    seen = []
    encoded = base.encode
    monkeypatch.setattr(base, "encode", lambda rgb: (seen.append(len(rgb)), encoded(rgb))[1])
    second = encode.make(recipe_of(grown), tmp_path, base)
    assert seen == [1]
    assert everything(first).keys() ^ everything(second).keys() == {"00.png", "new.png"}
    assert first.digest != second.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.resolution=64", "resolution 32, but now it is 64"),
        ("data.dtype=bf16", "dtype 'fp16', but now it is 'bf16'"),
        ("data.enlarge=true", "enlarge False, but now it is True"),
        ("data.max_cut=0.5", r"max_cut 0\.2, but now it is 0\.5"),
    ],
)
def test_a_mismatch_names_the_field(made, photos, base, change, words):
    run = made.folder.parent
    for act in (encode.make, encode.ensure):
        with pytest.raises(UsageError, match=words):
            act(recipe_of(photos, change), run, base)


def test_another_encoder_is_a_mismatch(made, photos, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(bases.resolve("klein-tiny"), folder)
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UsageError, match="was made with vae '"):
        encode.ensure(recipe_of(photos), made.folder.parent, bases.open_base(folder))
    snapshot = tmp_path / "models--someone--klein" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    assert encode.fingerprint(snapshot, ("vae",)) == "models--someone--klein@abc123"


def test_a_damaged_cache_is_named(made, tmp_path):
    broken = tmp_path / "cache"
    shutil.copytree(made.folder, broken)
    shard = next((broken / "images").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(Flux2PixelError, match=rf"{shard.name}: is damaged"):
        Cache(broken)
    index = (broken / "index.jsonl").read_text()
    (broken / "index.jsonl").write_text(index[index.index("\n") + 1 :])
    shutil.copy2(made.folder / "images" / shard.name, shard)
    with pytest.raises(Flux2PixelError, match=r"index\.jsonl is not the one that cache\.json names"):
        Cache(broken)
    (broken / "index.jsonl").write_text(index)
    shard.unlink()
    with pytest.raises(Flux2PixelError, match=r"the shard with \S+png is missing"):
        Cache(broken)
    (broken / "cache.json").write_text("{")
    with pytest.raises(Flux2PixelError, match=r"cache\.json: is not JSON"):
        Cache(broken)


def test_a_folder_of_something_else_is_left_alone(photos, base, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "diary.txt").write_text("dear")
    with pytest.raises(UsageError, match="exists and is not a cache"):
        encode.make(recipe_of(photos), tmp_path, base)


def test_nothing_usable_is_an_error(base, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("tiny")
    with pytest.raises(UsageError, match="holds no image"):
        encode.make(recipe_of(tmp_path), tmp_path / "run", base)


def test_embeddings_too_large_for_the_dtype_are_refused(photos, base, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "text", lambda prompts: {"text": torch.full((len(prompts), 2, 3), 1e5)})
    with pytest.raises(Flux2PixelError, match=r"set data\.dtype = bf16; of"):
        encode.make(recipe_of(photos), tmp_path, base)


def test_texts_of_unequal_length_are_stored_and_padded(photos, base, tmp_path, monkeypatch):
    """Families with a mask pad each call to its own longest prompt."""

    def text(prompts):
        length = max(map(len, prompts)) + 1
        mask = torch.tensor([[i <= len(p) for i in range(length)] for p in prompts])
        return {"text": mask[..., None] * torch.ones(5), "mask": mask}

    monkeypatch.setattr(base, "text", text)
    cache = encode.make(recipe_of(photos, "data.text_tokens=36"), tmp_path, base)  # three prompts of 12 tokens
    for bucket, count in enumerate(cache.counts):
        batch = cache.load(bucket, range(count))
        lengths = [len((photos / name).with_suffix(".txt").read_text()) + 1 for name in batch.names]
        assert batch.conditioning["mask"].dtype == torch.bool
        assert batch.conditioning["mask"].sum(1).tolist() == lengths
        assert batch.conditioning["text"][..., 0].sum(1).tolist() == lengths


def test_sample_prompts_are_captions_of_the_cache_and_embedded_once(photos, base, tmp_path, monkeypatch):
    seen = []
    text = base.text
    monkeypatch.setattr(base, "text", lambda prompts: (seen.extend(prompts), text(prompts))[1])
    recipe = recipe_of(photos, 'finetune.prompts=["a photo of a red circle"]')
    cache = encode.ensure(recipe, tmp_path, base)
    assert seen.count("a photo of a red circle") == 1
    assert torch.allclose(cache.text(["two squares", ""])["text"][1], cache.empty()["text"][0])
    seen.clear()
    assert encode.ensure(recipe, tmp_path, base).digest == cache.digest and not seen, "nothing is embedded again"
    more = recipe_of(photos, 'finetune.prompts=["a photo of a red circle", "two green squares"]')
    again = encode.ensure(more, tmp_path, base)
    assert seen == ["two green squares"] and again.digest == cache.digest
    expected = text(["two green squares"])["text"]
    assert torch.allclose(again.text(["two green squares"])["text"].float(), expected, atol=4e-3, rtol=1e-3)


def test_captions_are_embedded_by_a_budget_of_tokens(photos, base, tmp_path, monkeypatch):
    counts = []
    text = base.text
    monkeypatch.setattr(base, "text", lambda prompts: (counts.append(len(prompts)), text(prompts))[1])
    encode.make(recipe_of(photos, "data.text_tokens=60"), tmp_path, base)  # 12 tokens a caption
    assert counts == [5, 5, 5, 1]


def test_the_key_holds_what_the_encoders_ran_in_and_old_caches_are_read(made, photos, base, monkeypatch):
    recipe, run = recipe_of(photos), made.folder.parent
    assert made.manifest["key"]["text_length"] == 12 and made.manifest["key"]["encoders"] == "float32"
    with pytest.raises(UsageError, match="was made with encoders 'float32', but now it is 'bfloat16'"):
        encode.ensure(recipe, run, bases.open_base("klein-tiny", torch.bfloat16))
    before = {k: v for k, v in made.manifest["key"].items() if k not in ("text_length", "encoders")}
    encode.key_of(recipe, base).check(before, run)


def test_excluded_images_are_not_encoded_and_come_back_when_wanted(photos, base, tmp_path):
    recipe = recipe_of(photos, 'data.exclude=["00.png", "nothing.png"]')
    cache = encode.make(recipe, tmp_path, base)
    assert len(cache) == 29 and cache.manifest["excluded"] == ["00.png"]
    with pytest.raises(UsageError, match=r"no image is called 'nothing\.png'"):
        Cache(cache.folder, exclude=recipe.data.exclude)
    assert len(Cache(cache.folder, exclude=["00.png", "03.png"])) == 28
    assert len(encode.ensure(recipe_of(photos), tmp_path, base)) == 30


def test_an_epoch_shows_every_image_once_up_to_filling():
    order = Order((100, 7, 33), 8, seed=5)
    assert order.units_per_epoch == 13 + 1 + 5
    for epoch in range(3):
        counted: Counter = Counter()
        for number in range(epoch * 19, (epoch + 1) * 19):
            bucket, indices = order[number]
            assert len(indices) == 8
            counted.update((bucket, int(index)) for index in indices)
        assert len(counted) == 140 and sum(counted.values()) == 19 * 8
    assert [order[n][1].tolist() for n in range(19)] != [order[n + 19][1].tolist() for n in range(19)]


def test_the_global_batch_depends_on_seed_and_step_alone():
    order = Order((100, 50), 4, seed=1)
    for step in (0, 3, 70):
        whole = list(units_of(step, 16, 4))
        for world in (2, 4):
            parts = [list(units_of(step, 16, 4, rank, world)) for rank in range(world)]
            assert sorted(sum(parts, [])) == whole  # noqa: RUF017
    again, other = Order((100, 50), 4, seed=1), Order((100, 50), 4, seed=2)
    assert all(np.array_equal(order[n][1], again[n][1]) for n in (90, 2, 40, 2))
    assert any(not np.array_equal(order[n][1], other[n][1]) for n in range(20))
    share = np.mean([order.dropped(n, 0.1) for n in range(4000)])
    assert abs(share - 0.1) < 0.01 and not order.dropped(3, 0.0).any() and order.dropped(3, 1.0).all()
    with pytest.raises(UsageError, match=r"batch of 12 images is not a multiple of 4 images x 2 processes; 16 is"):
        units_of(0, 12, 4, 0, 2)


def test_the_loader_gives_the_steps_in_order_and_ends(made):
    order = Order(made.counts, 2, seed=0)
    loader = Loader(made, order, 8, range(5), caption_dropout=0.5)
    steps = list(loader)
    assert [[b.number for b in step] for step in steps] == [[4 * s + u for u in range(4)] for s in range(5)]
    names = [name for step in steps for batch in step for name in batch.names]
    later = [b.names for step in Loader(made, order, 8, range(3, 5), caption_dropout=0.5) for b in step]
    assert sum(later, []) == names[24:]  # noqa: RUF017
    parts = [list(Loader(made, order, 8, range(5), caption_dropout=0.5, rank=rank, world=2)) for rank in range(2)]
    for step, both in enumerate(zip(*parts, strict=True)):
        joined = sorted((b for part in both for b in part), key=lambda b: b.number)
        for one, other in zip(joined, steps[step], strict=True):
            assert torch.equal(one.rgb, other.rgb)
            assert torch.equal(one.conditioning["text"], other.conditioning["text"])
    assert loader.waited > 0


def test_an_error_of_the_loader_reaches_the_step(made, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error", "shard")

    loader = Loader(made, Order(made.counts, 2, seed=0), 4, range(3))
    monkeypatch.setattr(made, "load", fail)
    with pytest.raises(OSError, match="Input/output"):
        next(iter(loader))


def test_the_command(photos, tmp_path):
    words = ["cache", "--run", str(tmp_path), "--source", str(photos), "--images", "6"]
    result = CliRunner().invoke(app, [*words, "--dry-run"])
    assert result.exit_code == 0 and f"takes   images {photos}" in result.stdout and not (tmp_path / "cache").exists()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert sum(Cache(tmp_path / "cache").counts) == 6
    for wrong in (["--gpus", "0"], ["--source", str(tmp_path / "nowhere"), "--set", "data.cache=other"]):
        result = CliRunner().invoke(app, [*words, *wrong])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) <= 2, result.output
