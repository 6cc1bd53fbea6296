"""Images of a user: every kind of file, every kind of source, buckets, and what is said about bad ones."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from flux2pixel.data import Buckets, Rules, Tally, Unreadable, open_source, stream
from flux2pixel.data.decode import decode, read_bytes
from flux2pixel.runtime.errors import Flux2PixelError, UsageError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data)).astype(int)


def png(width: int, height: int, depth: int, color: int, rows: np.ndarray, extra: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow cannot save."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def test_lossless_formats_keep_every_value():
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(pixels(encoded(Image.fromarray(values), kind, **options)), values)


def test_jpeg_is_upright():
    values = np.full((8, 16, 3), 255, np.uint8)
    values[:, :8] = (200, 0, 0)
    image = Image.fromarray(values)
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    upright = pixels(encoded(image, "JPEG", exif=exif, quality=95, subsampling=0))
    assert upright.shape == (16, 8, 3)
    assert abs(upright[2, 4] - (200, 0, 0)).max() < 12 and upright[13, 4].min() > 243


def test_gray_palette_and_bilevel():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert np.array_equal(pixels(encoded(Image.fromarray(ramp))), ramp[..., None].repeat(3, 2))
    palette = Image.fromarray(ramp).convert("RGB").quantize(16)
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(ramp > 100)
    assert np.array_equal(pixels(encoded(bilevel))[..., 0], np.where(ramp > 100, 255, 0))


def test_transparency_is_laid_over_white():
    values = np.zeros((4, 4, 4), np.uint8)
    values[:2, :, 3] = 255
    values[2, :, 3] = 128
    flat = pixels(encoded(Image.fromarray(values)))
    assert (flat[:2] == 0).all() and (flat[3] == 255).all() and abs(flat[2] - 127).max() <= 1
    gray = Image.fromarray(values[..., 3], "L").convert("LA")
    gray.putalpha(Image.fromarray(values[..., 3]))
    assert (pixels(encoded(gray))[3] == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (pixels(encoded(palette, transparency=1)) == 255).all()
    assert (pixels(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == 255).all()


def test_sixteen_bits():
    gray = np.array([[0, 257 * 100, 257 * 200, 65535]], dtype=">u2")
    assert pixels(png(4, 1, 16, 0, gray))[0, :, 0].tolist() == [0, 100, 200, 255]
    color = np.array([[[0, 257 * 100, 65535], [257 * 7, 257 * 8, 257 * 9]]], dtype=">u2")
    assert pixels(png(2, 1, 16, 2, color))[0].tolist() == [[0, 100, 255], [7, 8, 9]]
    alpha = np.array([[[257 * 10, 257 * 20, 257 * 30, 0], [257 * 10, 257 * 20, 257 * 30, 65535]]], dtype=">u2")
    assert pixels(png(2, 1, 16, 6, alpha))[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_cmyk_and_profiles():
    cyan = pixels(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95))[4, 4]
    assert cyan[0] < 20 and cyan[1] > 235 and cyan[2] > 235
    image = Image.new("RGB", (8, 8), (120, 130, 140))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixels(encoded(image, icc_profile=srgb))[0, 0].tolist() == [120, 130, 140]
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # does not fit RGB pixels: ignored
    assert pixels(encoded(image, icc_profile=lab))[0, 0].tolist() == [120, 130, 140]
    assert pixels(encoded(image, icc_profile=b"not a profile"))[0, 0].tolist() == [120, 130, 140]


def test_another_colour_space_becomes_srgb():
    """An sRGB profile whose green and red colourants are swapped must swap the channels."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    described = bytes(profile).replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    swapped = pixels(encoded(Image.new("RGB", (4, 4), (200, 40, 90)), icc_profile=described))[0, 0]
    assert abs(swapped - (40, 200, 90)).max() <= 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (encoded(Image.new("RGB", (64, 64), "red"))[:-40], "truncated"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:700], "truncated"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "float"),
        (png(70000, 70000, 8, 0, np.zeros((1, 1), np.uint8)), "pixels"),
    ],
)
def test_broken_files_say_why(data: bytes, words: str):
    with pytest.raises(Unreadable, match=words):
        decode(read_bytes(data)[0])


def test_a_digest_is_of_the_content():
    picture = encoded(Image.new("RGB", (8, 8), "red"))
    assert read_bytes(picture)[1] == read_bytes(bytes(picture))[1] != read_bytes(picture + b"x")[1]
    flat = np.zeros((2, 8, 3), np.uint8)
    assert read_bytes(flat)[1] == read_bytes(flat.copy())[1] != read_bytes(flat.reshape(8, 2, 3))[1]


def test_buckets_keep_area_and_aspect():
    buckets = Buckets(1024, 16)
    assert (1024, 1024) in buckets.sizes
    for height, width in buckets.sizes:
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 1024**2 - 1) < 0.05
    assert buckets.place(2000, 2000).bucket == (1024, 1024)
    assert buckets.place(3000, 4500).bucket == tuple(reversed(buckets.place(4500, 3000).bucket)) == (832, 1248)
    assert buckets.place(512, 512).scale == 2
    assert buckets.place(1000, 4000).cut == pytest.approx(1 - (1456 / 720) / 4, abs=0.01)
    assert Buckets(0, 16).place(427, 640).bucket == (416, 640)
    with pytest.raises(UsageError, match="1008 is the nearest"):
        Buckets(1001, 16)


def test_fitting_never_squashes(tmp_path):
    """A disc stays a disc, to a pixel, through buckets of another aspect ratio."""
    y, x = np.mgrid[:300, :420]
    disc = np.where((x - 210) ** 2 + (y - 150) ** 2 < 100**2, 0, 255).astype(np.uint8)
    Image.fromarray(disc).save(tmp_path / "disc.png")
    rules = Rules(Buckets(128, 16))
    (batch,) = stream(open_source(str(tmp_path)), rules, 8, Tally())
    dark = batch.rgb[0, 0].numpy() < 128
    tall, wide = dark.any(1).sum(), dark.any(0).sum()
    assert abs(tall - wide) <= 1 and batch.rgb.shape[-2:] != (128, 128)
    assert np.allclose(np.argwhere(dark).mean(0), (np.array(dark.shape) - 1) / 2, atol=0.6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine good pictures in two folders, captions for the even ones, and one of each thing that goes wrong."""
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(9):
        place = root if index < 5 else root / "deep" / "er"
        size = (48, 64, 3) if index % 3 else (64, 64, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(place / f"p{index}.png")
        if index % 2 == 0:
            (place / f"p{index}.txt").write_text(f"picture {index}\n")
    return root


def spoil(root: Path) -> None:
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    Image.new("RGB", (20, 20)).save(root / "small.png")
    Image.new("RGB", (640, 64)).save(root / "wide.png")


RULES = Rules(Buckets(48, 8))


def gather(spec: str, rules: Rules = RULES, tally: Tally | None = None, **options):
    batches = list(stream(open_source(spec), rules, 4, tally or Tally(), **options))
    return {
        name: (caption, digest, rgb)
        for b in batches
        for name, caption, digest, rgb in zip(b.names, b.captions, b.digests, b.rgb, strict=True)
    }


def test_a_folder_with_captions(folder):
    found = gather(str(folder))
    assert sorted(found) == sorted([f"p{i}.png" for i in range(5)] + [f"deep/er/p{i}.png" for i in range(5, 9)])
    assert found["p2.png"][0] == "picture 2" and found["p1.png"][0] is None
    assert found["p1.png"][1] == read_bytes(folder / "p1.png")[1]


def test_everything_left_out_is_said(folder):
    spoil(folder)
    tally = Tally(limit=1)
    found = gather(str(folder), tally=tally)
    assert len(found) == tally.kept == 9 and tally.seen == 12
    text = "\n".join(tally.lines())
    assert "unreadable, skipped: 1" in text and "broken.jpg" in text
    assert "dropped: 2" in text and "small.png: 20 x 20 is smaller than its bucket 48 x 48 (x 2.40)" in text
    assert "wide.png: 640 x 64 would lose" in text
    tally = Tally()
    found = gather(str(folder), Rules(Buckets(48, 8), enlarge=True), tally)
    assert "small.png" in found and tally.enlarged == [("small.png", 2.4)]
    with pytest.raises(Flux2PixelError, match=r"1 of 1 images are unreadable, more than the 0 allowed \(broken\.jpg"):
        gather(str(folder), tally=Tally(limit=0))


def test_captions_can_be_required(folder):
    tally = Tally()
    assert len(gather(str(folder), Rules(Buckets(48, 8), captions=True), tally)) == 5
    assert ("p1.png", "has no caption") in tally.broken
    (folder / "p0.txt").write_bytes(b"\xff\xfe\xfa")
    gather(str(folder), tally=(tally := Tally()))
    assert tally.broken[0][0] == "p0.png" and "p0.txt is not UTF-8" in tally.broken[0][1]


def test_a_picture_known_already_is_not_decoded(folder):
    (folder / "p3.png").write_bytes(b"bad bytes")
    digest = read_bytes(folder / "p3.png")[1]
    tally = Tally(limit=0)
    assert len(gather(str(folder), tally=tally, known=lambda record, d: d == digest)) == 8
    assert tally.known == 1 and tally.seen == 9


def manifest(folder: Path) -> str:
    rows = [{"image": str(p.relative_to(folder.parent)), "caption": p.stem} for p in sorted(folder.rglob("*.png"))]
    path = folder.parent / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return str(path)


def tars(folder: Path, count: int = 3) -> str:
    for shard in range(count):
        with tarfile.open(folder.parent / f"s{shard}.tar", "w") as tar:
            for index, file in enumerate(sorted(folder.rglob("*.png"))):
                if index % count == shard:
                    members = {"png": file.read_bytes()}
                    members |= {"txt": file.stem.encode()} if index % 2 else {"json": b'{"caption": "from json"}'}
                    for suffix, data in members.items():
                        info = tarfile.TarInfo(f"{index:04}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return str(folder.parent / f"s{{0..{count - 1}}}.tar")


def hub(folder: Path) -> str:
    import datasets

    rows = {"picture": [str(p) for p in sorted(folder.rglob("*.png"))]}
    rows["caption"] = [Path(p).stem for p in rows["picture"]]
    data = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    target = folder.parent / "hub"
    target.mkdir(exist_ok=True)
    data.to_parquet(str(target / "train.parquet"))
    return f"hf:{target}?split=train"


def saved(folder: Path) -> str:
    import datasets

    target = folder.parent / "saved"
    datasets.load_dataset(hub(folder)[3:].partition("?")[0], split="train").save_to_disk(str(target))
    return f"hf:{target}"


SPECS = {
    "folder": str,
    "manifest": manifest,
    "tars": tars,
    "one tar": lambda folder: tars(folder, 1).replace("{0..0}", "0"),
    "globbed tars": lambda folder: (tars(folder), str(folder.parent / "s*.tar"))[1],
    "hf": hub,
    "hf streaming": lambda folder: hub(folder) + "&streaming=true",
    "hf saved": saved,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize("kind", SPECS)
def test_every_source_gives_the_same_pictures_and_splits_over_processes(kind, folder):
    spec = SPECS[kind](folder)
    plain = {digest for _, digest, _ in gather(str(folder)).values()}
    whole = gather(spec)
    assert {digest for _, digest, _ in whole.values()} == plain
    assert kind == "folder" or all(caption for caption, _, _ in whole.values())
    count = open_source(spec).count
    assert count in (9, None)
    for world in (2, 4):
        parts = [list(gather(spec, rank=rank, world=world)) for rank in range(world)]
        assert sorted(name for part in parts for name in part) == sorted(whole)
        assert parts == [list(gather(spec, rank=rank, world=world, threads=1)) for rank in range(world)]
    first = [r.name for r in open_source(spec).records(limit=5)]
    split = [[r.name for r in open_source(spec).records(rank, 2, 5)] for rank in range(2)]
    assert len(first) == 5 and split == [first[::2], first[1::2]]


def test_latents_beside_the_pictures(folder):
    from safetensors.torch import save_file

    made = {}
    for index in (0, 1, 2):
        count = 36 if index % 3 == 0 else 35
        made[f"p{index}.png"] = torch.randn(count, 16)
        save_file({"latents": made[f"p{index}.png"].half()}, folder / f"p{index}.safetensors")
    save_file({"latents": torch.zeros(3, 16)}, folder / "p3.safetensors")
    (folder / "p4.safetensors").write_bytes(b"no")
    save_file({"latents": torch.full((35, 16), torch.nan)}, folder / "deep" / "er" / "p5.safetensors")
    tally = Tally()
    batches = list(stream(open_source(str(folder)), RULES, 4, tally))
    found = {}
    for batch in batches:
        if batch.latents is not None:
            assert batch.latents.dtype == torch.float32
            found |= dict(zip(batch.names, batch.latents, strict=True))
    assert found.keys() == made.keys()
    assert all(torch.allclose(found[name], made[name], atol=1e-2) for name in made)
    assert sum(len(b.names) for b in batches if b.latents is None) == 3
    reasons = dict(tally.broken)
    assert reasons["p3.png"] == "its latents are 3 x 16, but at 48 x 48 it has 36 tokens"
    assert "p4.safetensors has no readable tensor named latents" in reasons["p4.png"]
    assert "not finite" in reasons["deep/er/p5.png"]


def test_scenes_and_photographs():
    names = [r.name for r in open_source("scenes", 7).records(0, 2, 5)]
    assert names == ["scene 7", "scene 9", "scene 11"]
    with pytest.raises(UsageError, match="no end"):
        next(open_source("scenes").records())
    found = gather("photographs", Rules(Buckets(256, 16), captions=True))
    assert {rgb.shape for _, _, rgb in found.values()} == {(3, 208, 320)}
    assert found["china.jpg"][2].float().std() > 30
    native = gather("photographs", Rules(Buckets(0, 16)))
    assert {rgb.shape for _, _, rgb in native.values()} == {(3, 416, 640)}


def test_a_damaged_tar_gives_what_it_still_holds(folder):
    spec = tars(folder, 1).replace("{0..0}", "0")
    data = Path(spec).read_bytes()
    Path(spec).write_bytes(data[: len(data) * 2 // 3])
    tally = Tally()
    found = gather(spec, tally=tally)
    assert 3 <= len(found) < 9
    assert any("s0.tar" in name and "cannot be read further" in reason for name, reason in tally.broken)


def test_bad_members_of_a_tar(tmp_path):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {"a.txt": b"alone", "b.png": b"xx", "b.json": b"{", "c.png": b"xx", "c.txt": b"\xff"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tally = Tally()
    assert not gather(str(path), tally=tally)
    reasons = dict(tally.broken)
    assert "no picture among its members (txt)" in reasons["bad.tar/a"]
    assert "caption cannot be read" in reasons["bad.tar/b"] and "caption cannot be read" in reasons["bad.tar/c"]


def test_bad_sources_say_what_to_do(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.gif").write_bytes(b"x")
    (tmp_path / "no.jsonl").write_text('{"image": "a.png"}\n{"imag": 3}\n')
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n{oops\n')
    (tmp_path / "caption.jsonl").write_text('{"image": "a.png", "caption": 3}\n')
    (tmp_path / "blank.jsonl").write_text("\n")
    for name, words in {
        "empty": r"no \.jpeg, \.jpg, \.png, \.webp in this folder",
        "absent": "no such image source",
        "one.gif": "is one file",
        "absent.jsonl": "cannot be read as a jsonl",
        "no.jsonl": r'no\.jsonl:2: no "image"',
        "bad.jsonl": r"bad\.jsonl:2: not JSON",
        "caption.jsonl": r'caption\.jsonl:1: "caption" is not a string',
        "blank.jsonl": "manifest is empty",
        "absent.tar": "no such shard",
        "s{0..1}.tar": r"s0\.tar: no such shard",
        "*.tar": "no such shard",
    }.items():
        with pytest.raises(UsageError, match=words):
            open_source(str(tmp_path / name))
    for spec, words in {
        "hf:": "an empty name",
        f"{hub(folder)}&splt=train": "splt is not known",
        f"{hub(folder)}&image=img": r"no column 'img'; it has picture, caption",
        f"hf:{tmp_path}/nowhere": "cannot be opened",
        f"{hub(folder)}&config=x": "cannot be opened",
    }.items():
        with pytest.raises(UsageError, match=words):
            open_source(spec)


def test_a_missing_package_is_one_clear_line(monkeypatch, tmp_path):
    import sys

    for package, spec in (("webdataset", "a.tar"), ("datasets", "hf:a/b")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=f"needs the package {package}; pip install"):
            open_source(spec)


def test_missing_files_of_a_manifest_are_broken_pictures(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"image": "nowhere.png"}\n')
    tally = Tally()
    assert not gather(str(path), tally=tally)
    assert tally.broken == [("nowhere.png", "No such file or directory")]
    with pytest.raises(Flux2PixelError, match="No such file"):
        gather(str(path), tally=Tally(limit=0))


def test_a_fit_takes_the_latents_beside_the_pictures(tmp_path, monkeypatch):
    """The sums are those of the VAE's own latents, and the VAE is not asked."""
    from safetensors.torch import save_file

    from flux2pixel.models import base as bases
    from flux2pixel.recipe import load
    from flux2pixel.runtime.processes import Team
    from flux2pixel.subspace.gather import gather

    base, root = bases.open_base("klein-tiny"), tmp_path / "photos"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"{index}.png")
    recipe = load(None, [f'fit_subspace.source="{root}"', "fit_subspace.resolution=0"])
    plain, _ = gather(base, recipe, Team(), tmp_path / "plain.safetensors")
    for file in root.glob("*.png"):
        rgb = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None] / 255
        save_file({"latents": base.encode(rgb)[0]}, file.with_suffix(".safetensors"))
    monkeypatch.setattr(base, "encode", None)
    given, _ = gather(base, recipe, Team(), tmp_path / "given.safetensors")
    assert torch.allclose(given.subset(0).xz, plain.subset(0).xz, rtol=1e-5, atol=1e-4)
    assert given.subset(0).tokens == 3 * 16
    for file in root.glob("*.safetensors"):
        save_file({"latents": torch.zeros(16, 5)}, file)
    with pytest.raises(Flux2PixelError, match=r"0\.png: latents beside it are 5 wide, those of the base 16"):
        gather(base, recipe, Team(), tmp_path / "wrong.safetensors")
