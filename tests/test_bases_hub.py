"""Resolving a base: aliases, folders, and the Hub, played by a server on this machine over the real client."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from families import write_base

from flux2pixel.cli.bases import bases_table
from flux2pixel.convert.run import source_of
from flux2pixel.families import registry
from flux2pixel.families.known import KNOWN
from flux2pixel.models import base as bases
from flux2pixel.models.hub import PARTS
from flux2pixel.runtime.errors import UsageError
from flux2pixel.weights.checkpoint import open_checkpoint

COMMIT = "c0ffee" + "0" * 34


class Hub(http.server.BaseHTTPRequestHandler):
    """One open repository, one gated, one that breaks off in the middle of a file; the rest are absent."""

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        folder = self.server.folder
        if "/FLUX.2-klein-base-9B" in self.path:
            return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if "/no-such-revision" in self.path:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if "/me/base" not in self.path:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if self.path.startswith("/api/") and "/tree/" in self.path:
            entries = [
                {"type": "file", "oid": "0" * 40, "size": p.stat().st_size, "path": str(p.relative_to(folder))}
                for p in files
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if self.path.startswith("/api/"):
            listed = {
                "id": "me/base",
                "sha": COMMIT,
                "siblings": [{"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size} for p in files],
            }
            return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        body = (folder / self.path.split(f"/resolve/{COMMIT}/")[1].split("?")[0]).read_bytes()
        tag = hashlib.sha256(body).hexdigest()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            self.server.resumed.append(start)
            total = len(body)
            return self.answer(206, body[start:], ETag=f'"{tag}"', Content_Range=f"bytes {start}-{total - 1}/{total}")
        if self.command == "GET" and len(body) > 20_000 and self.server.broken:
            return self.answer(403, b"{}", X_Error_Message="no more today")
        if self.command == "GET" and len(body) > 20_000 and self.server.breaks:
            self.server.breaks -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            self.wfile.write(body[:15_000])
            return self.hang_up()
        return self.answer(200, body, ETag=f'"{tag}"', Accept_Ranges="bytes")

    def hang_up(self):
        self.wfile.flush()
        self.connection.shutdown(2)
        self.close_connection = True


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("hub") / "base", "flux2-klein")
    (folder / "original.safetensors").write_bytes(b"0" * 100)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked, server.resumed, server.breaks, server.broken = folder, [], [], 0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def resolve(home, hub, *names, parts=PARTS, offline=False, before="", cwd=None, **environment):
    """Resolve each name in a process of its own, whose Hub is the given server; prints folders and errors."""
    script = (
        f"import sys, huggingface_hub.constants as client\nclient.DOWNLOAD_CHUNK_SIZE = 4096\n{before}"
        "from flux2pixel.models.base import resolve\nfrom flux2pixel.runtime.errors import UsageError\n"
        "for name in sys.argv[1:]:\n"
        f"    try: print('folder', resolve(name, {parts!r}, offline={offline}))\n"
        "    except UsageError as error: print('error', error)\n"
    )
    return python(script, home, hub, *names, cwd=cwd, **environment)


def python(script, home, hub, *words, cwd=None, **environment):
    """What a script prints that runs in a process of its own, whose Hub is the given server."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_part_can_be_had_without_the_rest(hub, tmp_path):
    (found,) = resolve(tmp_path, hub, "me/base", parts=("vae",))
    folder = Path(found.removeprefix("folder "))
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "transformer" / "config.json").is_file()
    assert not list(folder.glob("transformer/*.safetensors"))


def test_the_hub_is_asked_for_what_is_needed_and_its_refusals_are_one_line(hub, tmp_path):
    found, gated, absent = resolve(tmp_path, hub, "me/base", "flux2-klein-9b", "nobody/nothing")
    folder = Path(found.removeprefix("folder "))
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "vae" / "config.json").is_file() and (folder / "model_index.json").is_file()
    assert not (folder / "original.safetensors").exists(), "single-file weights beside the folders are not fetched"
    assert "is gated; accept its licence at https://huggingface.co/black-forest-labs/FLUX.2-klein-base-9B" in gated
    assert "hf auth login" in gated
    assert "nobody/nothing is not on the Hub, or private" in absent
    hub.asked.clear()
    offline, missing = resolve(tmp_path, hub, "me/base", "z-image", HF_HUB_OFFLINE="1")
    assert offline == found, "what is in the cache needs no network"
    assert "Tongyi-MAI/Z-Image is not in the local cache and the Hub cannot be reached" in missing
    assert hub.asked == []


def test_a_download_that_stops_says_so_and_one_that_breaks_off_is_resumed(hub, tmp_path):
    hub.broken = True
    (stopped,) = resolve(tmp_path, hub, "me/base")
    assert "me/base: the download stopped" in stopped and "run again to resume it" in stopped
    hub.broken, hub.breaks = False, 1
    (found,) = resolve(tmp_path, hub, "me/base")
    assert hub.resumed and min(hub.resumed) >= 4096, "the rest alone was asked for"
    for part in ("transformer", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (Path(found.removeprefix("folder ")) / name).read_bytes() == (hub.folder / name).read_bytes()


def test_a_revision_is_asked_for_and_the_folder_knows_its_commit(hub, tmp_path):
    hub.asked.clear()
    (found,) = resolve(tmp_path, hub, "me/base@v1.0", parts=("vae",))
    assert source_of(Path(found.removeprefix("folder ")))["base_commit"] == COMMIT and not source_of(hub.folder)
    assert any("/revision/v1.0" in path for _, path in hub.asked)
    (absent,) = resolve(tmp_path, hub, "me/base@no-such-revision")
    assert "me/base@no-such-revision: the repository has no such revision" in absent


def test_offline_asks_nobody(hub, tmp_path):
    (first,) = resolve(tmp_path, hub, "me/base")
    hub.asked.clear()
    (again,) = resolve(tmp_path, hub, "me/base", offline=True)
    (missing,) = resolve(tmp_path, hub, "me/base@other", offline=True)
    assert again == first and hub.asked == []
    assert "me/base@other is not in the local cache and the Hub cannot be reached, or was not to be asked" in missing


def test_a_disk_that_is_too_small_is_said_before_a_download(hub, tmp_path):
    """What is in the cache already is not counted again."""
    small = "import shutil, collections\nshutil.disk_usage = lambda p: collections.namedtuple('U', 'free')(2**20)\n"
    hub.asked.clear()
    (refused,) = resolve(tmp_path, hub, "me/base", before=small)
    assert "me/base needs 0.0 GB, 0.0 GB are free at" in refused and "HF_HUB_CACHE" in refused
    assert not any(path.endswith(".safetensors") for _, path in hub.asked)
    resolve(tmp_path, hub, "me/base")
    (found,) = resolve(tmp_path, hub, "me/base", before=small)
    assert found.startswith("folder ")


def test_a_mistyped_folder_says_what_is_beside_it(hub, tmp_path):
    for name in ("klein-base", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (refused,) = resolve(tmp_path / "home", hub, "models/klein-bose", cwd=tmp_path)
    assert "models/klein-bose is not on the Hub, or private, and no folder here" in refused
    assert "models/ holds klein-base, other" in refused


def test_a_plan_is_made_from_configs_and_headers_alone(hub, tmp_path):
    script = (
        "import json\nfrom flux2pixel.weights.remote import open_remote\nplan = open_remote('me/base')\n"
        "tensors = {name: [s.dtype, s.shape] for name, s in plan.checkpoint().tensors.items()}\n"
        "parts = sorted({name.removesuffix('.json').split('/')[0] for name in plan.sizes})\n"
        "print(json.dumps([plan.commit, parts, tensors, sum(plan.sizes.values())]))"
    )
    hub.asked.clear()
    commit, parts, tensors, size = json.loads(python(script, tmp_path, hub)[-1])
    assert commit == COMMIT and {"transformer", "vae", "scheduler", "model_index"} <= set(parts)
    expected = open_checkpoint(hub.folder / "transformer").tensors
    assert tensors == {name: [stored.dtype, list(stored.shape)] for name, stored in expected.items()}
    assert size == sum(path.stat().st_size for path in hub.folder.rglob("*") if path.is_file())
    weights = [path for method, path in hub.asked if path.endswith(".safetensors") and "/vae/" in path]
    assert weights == [], "the headers of the part that was asked for, no other"


def test_folders_and_names_that_are_no_base(tmp_path):
    with pytest.raises(UsageError, match="did you mean flux2-klein-9b"):
        bases.resolve("flux2-klien-9b")
    with pytest.raises(UsageError, match="known: klein-tiny, flux2-klein-4b"):
        bases.resolve("zzz")
    with pytest.raises(UsageError, match=r"has no transformer/config\.json"):
        bases.resolve(str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be converted: a flow map.*use flux3-klein"):
        bases.resolve("flux3-klein-distilled")
    folder = write_base(tmp_path / "unet", "flux2-klein")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(UsageError, match="'UNet2DConditionModel' is of no family"):
        bases.open_base(folder)
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        bases.open_base(folder)


def test_a_flow_map_is_refused_wherever_it_comes_from(tmp_path):
    folder = write_base(tmp_path / "any name", "flux3")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flow_map": True}))
    with pytest.raises(UsageError, match="a flow map"):
        bases.open_base(folder)


def test_distilled_checkpoints_are_known_and_not_guided(tmp_path):
    klein = write_base(tmp_path / "klein", "flux2-klein")
    assert (bases.open_base(klein).guidance, bases.open_base(klein).cautions()) == ("cfg", [])
    (klein / "model_index.json").write_text(json.dumps({"is_distilled": True}))
    assert bases.open_base(klein).guidance == "none"
    assert "distilled to few steps" in bases.open_base(klein).cautions()[0]
    (klein / "model_index.json").unlink()
    assert "which alone says if it is distilled: taken as not" in bases.open_base(klein).cautions()[0]
    turbo = write_base(tmp_path / "turbo", "z-image")
    assert bases.open_base(turbo).guidance == "cfg"
    (turbo / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 3.0}))
    assert bases.open_base(turbo).guidance == "none"
    assert bases.open_base(write_base(tmp_path / "schnell", "flux1-schnell")).guidance == "none"
    dev = bases.open_base(write_base(tmp_path / "dev", "flux1-dev"))
    assert dev.guidance == "embedded" and "takes its guidance as a number" in dev.cautions()[0]


def test_the_table_lists_every_alias():
    lines = bases_table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*registry.names(), *KNOWN]
    for alias, known in KNOWN.items():
        assert not known.undistilled or known.undistilled in KNOWN, alias
