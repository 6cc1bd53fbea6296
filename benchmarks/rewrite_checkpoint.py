"""Claim: rewriting a checkpoint of FLUX.2 klein 9B's shapes takes at most 1.25 times ``cp -r`` of the same files.

    python benchmarks/rewrite_checkpoint.py [--folder DIR] [--double 8 --single 24] [--shard 5] [--repeats 3]

Makes a synthetic base with klein 9B's own tensor shapes (random bytes, depth reduced on request), then in turn copies
its transformer with ``cp -r`` and converts it: plan, copy, fold, read back, hash, check every value, reopen, compare
the folded tensors with the independent fold. Both sides end with their bytes on the disk (``sync``); importing the
libraries is not counted. Prints medians, the ratio, ``--link``, and the memory of a process that converts less that of
one that has only imported the libraries and planned.
Everything it wrote is deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KLEIN_9B = {
    "in_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
VAE = {"latent_channels": 32, "patch_size": [2, 2], "block_out_channels": [128, 256, 512, 512]}
PARTS = {"transformer": ["diffusers", "Flux2Transformer2DModel"], "scheduler": ["diffusers", "X"]}


def make_base(folder: Path, double: int, single: int, shard: float) -> int:
    """Write the base and return the bytes of its transformer; one block of random bytes serves every tensor."""
    from diffusers import Flux2Transformer2DModel

    from flux2pixel.convert.plan import class_shapes
    from flux2pixel.weights.checkpoint import INDEX
    from flux2pixel.weights.write import header

    config = KLEIN_9B | {"num_layers": double, "num_single_layers": single}
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = shard * 1e9
    for name, shape in class_shapes(Flux2Transformer2DModel, config).items():
        if 2 * math.prod(shape) > room and groups[-1]:
            groups, room = [*groups, []], shard * 1e9
        groups[-1].append((name, shape))
        room -= 2 * math.prod(shape)
    noise = bytes(b & 0x3F for b in os.urandom(8 << 20))  # the high byte of a bfloat16 stays below 2
    places, total = {}, 0
    for number, group in enumerate(groups, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (transformer / file).open("wb") as out:
            outputs = tuple(_declare(name, shape) for name, shape in group)
            out.write(header(outputs, {"format": "pt"}))
            for output in outputs:
                places[output.name], total, left = file, total + output.size, output.size
                while left:
                    left -= out.write(noise[: min(left, len(noise))])
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (transformer / INDEX).write_text(json.dumps(index))
    (transformer / "config.json").write_text(json.dumps({"_class_name": "Flux2Transformer2DModel"} | config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"} | PARTS))
    for part, name, content in (("vae", "config.json", VAE), ("scheduler", "scheduler_config.json", {})):
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps(content))
    return total


def _declare(name: str, shape: tuple[int, ...]):
    from flux2pixel.weights.checkpoint import Span, Stored
    from flux2pixel.weights.write import Output

    return Output(name, "BF16", shape, Stored("BF16", shape, (Span(Path(), 0, 2 * math.prod(shape)),)))


def child(base: str, out: str, link: bool) -> None:
    """Convert as the stage does, up to and with the comparison of every tensor; no ``out``: only import and plan."""
    import torch
    from diffusers import Flux2Transformer2DModel  # noqa: F401  # the first use would count as rewriting

    from flux2pixel.asymflow.linalg import polar
    from flux2pixel.asymflow.method import AsymFlow
    from flux2pixel.convert.compare import check_tensors, open_written
    from flux2pixel.convert.prepare import Extras, prepare
    from flux2pixel.convert.run import check_places, write_transformer
    from flux2pixel.recipe import load

    recipe = load(None, [f"base={base}"])
    flow = AsymFlow(polar(torch.randn(768, 128, dtype=torch.float64)).float(), 1.1)
    began = time.perf_counter()
    job = prepare(recipe, flow, Extras(link=link))
    if out:
        write_transformer(job.plan, Path(out), job.base, recipe)
        written = open_written(Path(out), job)
        check_places(job.plan, written)
        check_tensors(job, written, copied={o.name for s in job.plan.shards for o in s.outputs if not o.rows})
        os.sync()
    print(json.dumps({"seconds": time.perf_counter() - began, "planned": job.plan.working_memory}))


def measure(base: Path, out: Path | None, *, link: bool = False) -> dict[str, float]:
    """Run ``child`` in a process of its own; its seconds and its peak resident memory, bytes."""
    words = [sys.executable, __file__, "--child", str(base), str(out or ""), str(int(link))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"converting failed with exit code {process.returncode}")
    return json.loads(text.splitlines()[-1]) | {"peak": usage.ru_maxrss * 1024}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4] == "1")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    parser.add_argument("--double", type=int, default=8)
    parser.add_argument("--single", type=int, default=24)
    parser.add_argument("--shard", type=float, default=5.0, help="largest shard of the base, GB; 10: 2 files, 99: 1")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="rewrite-", dir=args.folder))
    try:
        size = make_base(work / "base", args.double, args.single, args.shard)
        if 2.2 * size > shutil.disk_usage(work).free:
            raise SystemExit(f"not enough room beside {size / 1e9:.1f} GB: reduce --double and --single")
        os.sync()
        transformer = work / "base" / "transformer"
        idle = measure(work / "base", None)["peak"]
        copies, rewrites, links, peaks = [], [], [], []
        for _ in range(args.repeats):
            began = time.perf_counter()
            subprocess.run(["cp", "-r", transformer, work / "copy"], check=True)
            os.sync()
            copies.append(time.perf_counter() - began)
            shutil.rmtree(work / "copy")
            os.sync()
            done = measure(work / "base", work / "out")
            rewrites.append(done["seconds"])
            peaks.append(done["peak"] - idle)
            shutil.rmtree(work / "out")
            os.sync()
            links.append(measure(work / "base", work / "out", link=True)["seconds"])
            shutil.rmtree(work / "out")
            os.sync()
            print(f"cp -r {copies[-1]:.1f} s, rewrite {rewrites[-1]:.1f} s, --link {links[-1]:.1f} s", flush=True)
        copy, rewrite, link = map(statistics.median, (copies, rewrites, links))
        files = len(list(transformer.glob("*.safetensors")))
        print(f"{size / 1e9:.2f} GB in {files} files, {args.double} + {args.single} blocks; medians of {args.repeats}")
        print(f"cp -r and sync  {copy:7.1f} s   {size / copy / 1e6:6.0f} MB/s")
        print(f"full rewrite    {rewrite:7.1f} s   {size / rewrite / 1e6:6.0f} MB/s   {rewrite / copy:.2f} of cp -r")
        print(f"--link          {link:7.1f} s   (the first and the last file change)")
        print(f"memory          {max(peaks) / 1e6:7.0f} MB at the peak, beside {idle / 1e6:.0f} MB of libraries")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
