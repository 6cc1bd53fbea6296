"""Weights and data: got whole, checked, converted once, and refused when they are not what was pinned."""

import functools
import hashlib
import http.server
import json
import threading
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from safetensors import safe_open

from flux2pixel.evaluate import open_scorers
from flux2pixel.evaluate.assets import convert as convert_assets
from flux2pixel.evaluate.assets import fetch
from flux2pixel.evaluate.assets.fetch import Assets, Source
from flux2pixel.evaluate.dpg_bench.questions import GIT_BLOB, git_blob
from flux2pixel.evaluate.hpsv3 import inputs
from flux2pixel.runtime.errors import Flux2PixelError, UsageError


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, parts of files too, and notes what was asked."""

    asked: list[str | None] = []  # noqa: RUF012

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        path = self.translate_path(self.path)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            return self.send_error(404)
        first = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first:])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    Ranged.asked = []
    handler = functools.partial(Ranged, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_got_once_checked_and_put_in_its_place(site, tmp_path):
    folder, url = site
    (folder / "x.bin").write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    assets = Assets(tmp_path / "assets")
    for _ in range(2):
        assets.place(Source("x.bin", f"{url}/x.bin", sha256=digest[:8]), "suite/x.bin")
    assert (tmp_path / "assets/suite/x.bin").read_bytes() == b"content"
    assert assets.digests == {"x.bin": digest} and len(Ranged.asked) == 1


def test_a_part_is_continued(site, tmp_path):
    folder, url = site
    (folder / "x.bin").write_bytes(b"0123456789")
    part = tmp_path / "assets/downloads/x.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"0123")
    assert Assets(tmp_path / "assets").get(Source("x.bin", f"{url}/x.bin")).read_bytes() == b"0123456789"
    assert Ranged.asked == ["bytes=4-"] and not part.exists()


def test_what_is_not_what_was_pinned_is_refused(site, tmp_path):
    folder, url = site
    (folder / "x.bin").write_bytes(b"other")
    assets = Assets(tmp_path / "assets")
    with pytest.raises(Flux2PixelError, match=r"x\.bin: sha256 .*, want 743b7d99"):
        assets.get(Source("x.bin", f"{url}/x.bin", sha256="743b7d99"))
    with pytest.raises(Flux2PixelError, match=r"git blob .*, want 98457fc99019"):
        assets.get(Source("x.bin", f"{url}/x.bin", git_blob=GIT_BLOB))
    assets.get(Source("x.bin", f"{url}/x.bin", git_blob=git_blob(b"other")))
    (assets.folder / "downloads/x.bin").write_bytes(b"changed since")
    with pytest.raises(Flux2PixelError, match=r"x\.bin: sha256"):
        assets.get(Source("x.bin", f"{url}/x.bin"))  # unlike the first fetch


def test_what_is_on_the_hub_is_got_by_its_own_client(tmp_path, monkeypatch):
    """Every Hub file of HPSv3: which repository and kind it is asked of, and that it lands in its place."""
    import huggingface_hub

    asked = []

    def serve(repo, name, *, repo_type, local_dir):
        asked.append((repo_type, repo, name))
        if name == "HPSv3.safetensors":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nat all")
        path = local_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    monkeypatch.setattr(convert_assets, "instruction", lambda path: None)
    with pytest.raises(
        Flux2PixelError, match=r"HPSv3\.safetensors: cannot be had \(no network\); get it elsewhere"
    ) as said:
        fetch.fetch(["hpsv3"], tmp_path)
    assert "\n" not in str(said.value)
    assert ("dataset", "MizzenAI/HPDv3", "benchmark/benchmark_Natural Scenery.json") in asked
    assert ("model", "Qwen/Qwen2-VL-7B-Instruct", "vocab.json") in asked and len(asked) == 12 + 5 + 1
    assert (tmp_path / "hpsv3/qwen2-vl/vocab.json").read_text() == "vocab.json"
    assert not list(tmp_path.rglob(".hub/*/vocab.json"))


def test_what_cannot_be_had_says_where_to_put_it(site, tmp_path):
    assets = Assets(tmp_path / "assets")
    with pytest.raises(Flux2PixelError, match=r"404 Not Found; get it by hand and put it at .*downloads/x\.bin"):
        assets.get(Source("x.bin", f"{site[1]}/absent"))
    with pytest.raises(Flux2PixelError, match="cannot be reached"):
        assets.get(Source("x.bin", "http://127.0.0.1:9/absent"))
    with pytest.raises(UsageError, match="known are geneval, dpg-bench, hpsv3, fidelity"):
        fetch.fetch(["psnr"], tmp_path)


def test_a_checkpoint_is_converted_once_weights_only(site, tmp_path):
    folder, url = site
    state = {
        "model": {"module": {"model.a.weight": torch.ones(2), "a_m.weight": torch.zeros(2)}},
        "epoch": np.float64(3),
    }
    torch.save(state, folder / "m.bin")
    assets = Assets(tmp_path / "assets")
    assets.make(Source("m.bin", f"{url}/m.bin"), "m/model.safetensors", convert_assets.mplug)
    with safe_open(assets.folder / "m/model.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["a.weight"]
        assert file.metadata()["source_sha256"] == assets.digests["m.bin"]
    assert not (assets.folder / "downloads/m.bin").exists()
    assets.make(Source("m.bin", f"{url}/m.bin"), "m/model.safetensors", convert_assets.mplug)
    assert len(Ranged.asked) == 1


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys, zipped):
    torch.save({"state_dict": {}, "meta": Harmful()}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(Flux2PixelError, match=r"x\.pth: cannot be loaded as weights alone"):
        convert_assets.detector(tmp_path / "x.pth", tmp_path / "d/model.safetensors", {})
    (tmp_path / "x.pth").write_bytes(b"\x80")
    with pytest.raises(Flux2PixelError, match="cannot be loaded"):
        convert_assets.read_pickle(tmp_path / "x.pth")
    assert "code ran" not in capsys.readouterr().out
    assert not (tmp_path / "d").exists()


def test_the_instruction_is_found_by_its_digest(tmp_path, monkeypatch):
    text = "rate\nthis: {text_prompt} "
    monkeypatch.setattr(inputs, "INSTRUCTION_SHA256", hashlib.sha256(text.encode()).hexdigest())
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("hpsv3/a.py", f"raise SystemExit\nINSTRUCTION = {text!r}\n")
    assert convert_assets.find_instruction(tmp_path / "x.whl") == text
    monkeypatch.setattr(inputs, "INSTRUCTION_SHA256", "0" * 64)
    with pytest.raises(Flux2PixelError, match=r"x\.whl: does not hold HPSv3's instruction"):
        convert_assets.find_instruction(tmp_path / "x.whl")


def test_absent_assets_say_what_to_fetch(tmp_path):
    geneval = open_scorers.geneval_prompts()
    assert len(geneval) == 553
    for suite, call in (
        ("geneval", lambda: open_scorers.geneval(tmp_path, "cpu", geneval)),
        ("dpg-bench", lambda: open_scorers.dpg_bench_prompts(tmp_path)),
        ("dpg-bench", lambda: open_scorers.dpg_bench(tmp_path, "cpu", [], "")),
        ("hpsv3", lambda: open_scorers.hpsv3_prompts(tmp_path)),
        ("hpsv3", lambda: open_scorers.hpsv3(tmp_path, "cpu", [])),
    ):
        with pytest.raises(UsageError, match=f"--suite {suite} --fetch"):
            call()


@pytest.fixture
def small_clip(monkeypatch):
    """ViT-L-14-quickgelu's own configuration with two thin layers a tower."""
    full = open_clip.get_model_config("ViT-L-14-quickgelu")
    assert full["quick_gelu"]
    full["vision_cfg"] |= {"layers": 2, "width": 64}
    full["text_cfg"] |= {"layers": 2, "width": 64, "heads": 1}
    full["embed_dim"] = 16
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14-quickgelu", full)
    torch.manual_seed(1)
    return open_clip.create_model("ViT-L-14-quickgelu", load_weights=False).eval()


def test_clip_comes_out_of_openais_archive_and_names_colors(small_clip, tmp_path):
    class Archive(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.visual, self.transformer = weights.visual, weights.transformer
            self.token_embedding, self.ln_final = weights.token_embedding, weights.ln_final
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(weights, name))
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return x

    torch.jit.trace(Archive(small_clip), torch.zeros(1)).save(str(tmp_path / "clip.pt"))
    target = tmp_path / "clip.safetensors"
    convert_assets.clip(tmp_path / "clip.pt", target, {"source_sha256": "abc"})
    classifier = open_scorers.colors(target, "cpu")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    box = (5.0, 5.0, 30.0, 30.0)
    (named,) = classifier(image, "dog", [(box, np.ones((40, 50), bool))])
    assert classifier.provenance()["source_sha256"] == "abc"

    from PIL import Image

    from flux2pixel.evaluate.geneval import colors

    with torch.inference_mode():  # the definition, from the model that was archived
        pixels = colors.clip_transform()(Image.fromarray(image).crop((5, 5, 30, 30)))[None]
        texts = small_clip.encode_text(open_clip.get_tokenizer("ViT-L-14-quickgelu")(colors.texts("dog")))
        expected = colors.color_logits(small_clip.encode_image(pixels), colors.classifier_weights(texts))
    assert named == colors.COLORS[expected.argmax()]
    (tmp_path / "clip.pt").write_bytes(b"x")
    with pytest.raises(Flux2PixelError, match="not OpenAI's CLIP archive"):
        convert_assets.clip(tmp_path / "clip.pt", target, {})


def test_the_digests_file_is_plain_json(tmp_path):
    (tmp_path / "digests.json").write_text(json.dumps({"a": "b"}))
    assert Assets(tmp_path).digests == {"a": "b"}
