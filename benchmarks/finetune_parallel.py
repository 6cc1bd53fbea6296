"""Claim: what FSDP2 costs over the same work without it, and what a checkpoint costs over writing the same bytes.

    python benchmarks/finetune_parallel.py [--repeats 9]

Starts itself under torchrun in two gloo processes of one thread each. Both train the same network on the same number of
images a process, once sharded (weights gathered, gradients reduced) and once alone, in turn; medians by the wall clock
and of CPU time, which other processes of the machine hardly change but which leaves waiting out. Then a save of the
sharded training (network, AdamW, weight average) against one plain file of as many bytes, written and synced by each
process for its part. Two cores of one machine say nothing about a network between GPUs: the figure is FSDP2's own work
and gloo's copies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from finetune_step import networks, random_batch

from flux2pixel import recipe as recipes
from flux2pixel.finetune.network import checkpoint, parallel
from flux2pixel.finetune.network.parallel import local
from flux2pixel.finetune.network.trainable import prepare
from flux2pixel.finetune.step.objective import LatentReference, Objective
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.runtime.processes import Team

OUT = Path(__file__).with_suffix(".json")
IMAGES = 32


def trainer(recipe: recipes.Recipe, team: Team, wide: bool) -> Trainer:
    """A training of the miniature or of a random 512-wide network, sharded if the team has a mesh."""
    base, latent, pixel, flow = networks(wide)
    groups = prepare(pixel, base, recipe.finetune, 0)
    if team.mesh is not None:
        parallel.shard(latent, team.mesh, recipe.finetune.precision)
        parallel.shard(pixel, team.mesh, recipe.finetune.precision)
    return Trainer(recipe, pixel, groups, Objective(recipe.finetune, base, flow, LatentReference(base, latent)), team)


def measure(wide: bool, repeats: int, team: Team) -> dict[str, float]:
    """Seconds of a step, sharded and alone; of a save and of a plain write."""
    recipe = recipes.load(None, ["finetune.steps=1000", f"finetune.batch={IMAGES * team.world}"])
    sharded, alone = trainer(recipe, team, wide), trainer(recipe, Team(0, 1, team.device), wide)
    batch = random_batch(IMAGES)
    names = ("sharded", "alone", "sharded_cpu", "alone_cpu", "save", "plain_write")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as shared:
        folder = Path(team.gather(shared)[0])
        for turn in range(repeats + 1):
            for name, one in (("sharded", sharded), ("alone", alone)):
                team.barrier()
                began, busy = time.perf_counter(), time.process_time()
                one.advance([batch])
                busy = time.process_time() - busy
                team.barrier()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
                    seconds[f"{name}_cpu"].append(busy)
            if turn > repeats - 5:
                seconds["save"].append(checkpoint.save(sharded.state, folder, recipe, team, {"model": "", "data": ""}))
                seconds["plain_write"].append(plain_write(sharded, folder, team))
        team.barrier()
    found = {name: statistics.median(values) for name, values in seconds.items()}
    found["step_ratio"], found["cpu_ratio"] = (found[f"sharded{c}"] / found[f"alone{c}"] for c in ("", "_cpu"))
    found["save_ratio"] = found["save"] / found["plain_write"]
    found["parameters"] = float(sum(p.numel() for p in alone.network.parameters()))
    return found


def plain_write(one: Trainer, folder: Path, team: Team) -> float:
    """Write this process's bytes of the state to one file and sync it."""
    state = one.state.tensors()
    parts = [local(t) for table in state.values() for t in table.values() if isinstance(t, torch.Tensor)]
    team.barrier()
    began = time.perf_counter()
    with (folder / f"plain-{team.rank}").open("wb") as file:
        for part in parts:
            file.write(part.contiguous().numpy().data)
        file.flush()
        os.fsync(file.fileno())
    team.barrier()
    return time.perf_counter() - began


def main() -> None:
    """Start two processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if not parallel.launched():
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launcher, __file__, "--repeats", str(args.repeats)], check=True)
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo")
    team = Team(dist.get_rank(), 2, torch.device("cpu"), parallel.mesh("cpu", 2, 1))
    shapes = (("miniature", False), ("512 wide", True))
    found = {name: measure(wide, args.repeats, team) for name, wide in shapes}
    if team.leads:
        for name, row in found.items():
            print(
                f"{name} ({row['parameters'] / 1e6:.1f} M parameters, {IMAGES} images a process): "
                f"sharded step {row['sharded'] * 1e3:.0f} ms, {row['step_ratio']:.3f} of alone by the wall, "
                f"{row['cpu_ratio']:.3f} in CPU time; save {row['save'] * 1e3:.0f} ms, "
                f"{row['save_ratio']:.2f} of a plain synced write"
            )
        OUT.write_text(json.dumps({"images": IMAGES, "repeats": args.repeats, **found}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
