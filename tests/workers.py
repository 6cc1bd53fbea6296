"""Processes that the tests of training start: ``python tests/workers.py NAME ARGUMENTS`` (under torchrun for some)."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from finetuning import LORA, small
from torch.distributed.tensor import DTensor

from flux2pixel.cli import main
from flux2pixel.data import encode
from flux2pixel.data.cache import Cache
from flux2pixel.evaluate import run as evaluation
from flux2pixel.finetune import run as stage
from flux2pixel.finetune.data.loader import Loader
from flux2pixel.finetune.data.order import Order
from flux2pixel.finetune.network import checkpoint, parallel
from flux2pixel.finetune.step.ema import PowerEma
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.recipe import Recipe, load
from flux2pixel.runtime import launch, processes
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.launch import exit_process
from flux2pixel.runtime.processes import Team, join
from flux2pixel.subspace import run as fit


def kills(run: Path) -> None:
    """Start the same training again and again, ended each time in another way; the last is left in peace."""
    recipe = small("finetune.steps=8", *LORA, "finetune.lora_dropout=0.1")
    for kind, step in [("kill", 1), ("term", 2), ("save", 4), ("kill", 5), ("kill", 7), ("none", 0)]:
        child = os.fork()
        if child == 0:
            _sabotage(kind, step)
            try:
                stage.finetune(recipe, run)
                os._exit(0)
            except SystemExit as left:
                os._exit(int(left.code or 0))
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed == (kind in ("kill", "save")), (kind, status)
        assert killed or os.WEXITSTATUS(status) == 0, (kind, status)
        found = checkpoint.newest(run / "checkpoints")
        print(kind, step, found.name if found else "none", (run / stage.STOPPED).is_file())


def _sabotage(kind: str, step: int) -> None:
    advance, write_json = Trainer.advance, checkpoint.files.write_json

    def fatal(self, batches):
        if self.state.step == step and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.state.step == step and kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, batches)

    def cut(path, value):
        if path.name == checkpoint.MANIFEST and value["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)  # all of DCP's files are there, the manifest is not
        write_json(path, value)

    Trainer.advance = fatal
    if kind == "save":
        checkpoint.files.write_json = cut


def two_ranks(run: Path) -> None:
    """LoRA under FSDP2: DTensors, the average against a whole one, an abort on all ranks, a checkpoint for one rank."""
    recipe = small(*LORA)
    with join(lambda: stage.prepare(recipe, run, gpus=2)) as alone:
        team = parallel.meshed(alone, recipe.finetune.replicas)
        source, cache = stage.open_source(run / "converted", recipe), Cache(encode.cache_folder(recipe, run))
        trainer = stage.build(recipe, source, team)
        state = trainer.state
        assert trainer.trained and all(isinstance(p, DTensor) for p in trainer.network.parameters())
        assert all(isinstance(v, DTensor) for v in state.ema.values.values())
        assert all(p.to_local().numel() < p.numel() for p in trainer.trained if p.shape[0] > 1)
        assert not isinstance(trainer.objective.flow.basis, DTensor)
        assert trainer.objective.flow.basis.dtype == torch.float32
        order = Order(cache.counts, 4, recipe.seed)
        loader = Loader(cache, order, 8, range(3), rank=team.rank, world=2)
        names = [n for n, p in trainer.network.named_parameters() if p.requires_grad]
        follower = torch.nn.ParameterDict({n.replace(".", "/"): parallel.whole(state.ema.values[n]) for n in names})
        whole = PowerEma(follower, recipe.finetune.ema_gamma)
        for batches in loader:
            trainer.advance(batches)
            for name, parameter in trainer.network.named_parameters():
                if parameter.requires_grad:
                    follower[name.replace(".", "/")].data.copy_(parallel.whole(parameter.detach()))
            whole.update(follower)
        for name in names:
            averaged = parallel.whole(state.ema.values[name])
            torch.testing.assert_close(averaged, whole.values[name.replace(".", "/")], rtol=1e-6, atol=1e-7)
        identity = {"model": source.digest, "data": cache.digest}
        checkpoint.save(state, run / "checkpoints", recipe, team, identity)
        trained = {n: parallel.whole(p.detach()) for n, p in trainer.network.named_parameters() if p.requires_grad}
        if team.leads:
            torch.save(trained, run / "trained.pt")
        trainer.settings = replace(trainer.settings, skip_limit=0)
        batches = loader.load(3)
        if team.rank == 1:
            batches[0].latents[0] = float("nan")
        before = [parallel.local(p).clone() for p in trainer.trained]
        try:
            trainer.advance(batches)
        except Flux2PixelError as error:
            said = team.gather(str(error))
            assert said[0] == said[1], said
            guilty = team.gather(batches[0].names)[1]
            assert all(name in said[0] for name in guilty), (said, guilty)
        else:
            raise AssertionError("a NaN on one rank stopped nobody")
        assert all(torch.equal(a, parallel.local(p)) for a, p in zip(before, trainer.trained, strict=True))
        print(f"rank {team.rank} of {team.world} done")


# Every cell is a recipe; four processes are two copies of two shards, two are one copy.
BF16, ACCUMULATE, RECOMPUTE = "finetune.precision=bf16", "finetune.micro_batch=1", "finetune.checkpointing=true"
EIGHT = "finetune.optimizer=adamw-8bit"
ADAPTED = (*LORA, "finetune.lora_dropout=0.1")
CELLS = {
    2: {
        "full, float32": (),
        "full, bf16, recomputed": (BF16, RECOMPUTE),
        "full, float32, accumulated, 8 bits": (ACCUMULATE, EIGHT),
        "LoRA, float32, recomputed": (*ADAPTED, RECOMPUTE),
        "LoRA, bf16, accumulated": (*ADAPTED, BF16, ACCUMULATE),
        "LoRA, bf16, recomputed, accumulated, 8 bits": (*ADAPTED, BF16, RECOMPUTE, ACCUMULATE, EIGHT),
    },
    4: {
        "full, bf16, accumulated": (BF16, ACCUMULATE),
        "LoRA, float32, accumulated": (*ADAPTED, ACCUMULATE),
        "LoRA, bf16, recomputed, 8 bits": (*ADAPTED, BF16, RECOMPUTE, EIGHT),
    },
}
BEFORE, AFTER = 2, 1  # steps before and after the checkpoint


def matrix(run: Path) -> None:
    """Each cell sharded and in one process, from the same weights; then from its checkpoint on. Rank 0 writes a line a
    cell: the losses of both, how far the weights are apart, and whether the resumed training is the same to the bit."""
    torch.compiler.set_stance("force_eager")  # torchao compiles its step, which takes longer than all of this
    world = int(os.environ["WORLD_SIZE"])
    with join() as team:
        team = parallel.meshed(team, world // 2)
        for name, options in CELLS[world].items():
            fewer = [f"finetune.replicas={world // 2}", "finetune.micro_batch=2", *options]
            _cell(run, name, small(*fewer), team)


def _cell(run: Path, name: str, recipe: Recipe, team: Team) -> None:
    alone = Team(0, 1, team.device)
    sharded, losses = _stepped(run, recipe, team, None)
    assert all(isinstance(p, DTensor) for p in sharded.network.parameters())
    mine = {n: parallel.whole(p.detach()) for n, p in sharded.network.named_parameters() if p.requires_grad}
    resumed, again = _stepped(run, recipe, team, run / name)
    theirs = {n: parallel.whole(p.detach()) for n, p in resumed.network.named_parameters() if p.requires_grad}
    same = again == losses[BEFORE:] and all(torch.equal(theirs[n], mine[n]) for n in mine)
    if team.leads:
        whole, expected = _stepped(run, recipe, alone, None)
        parts = {n: p.detach() for n, p in whole.network.named_parameters() if p.requires_grad}
        distance, size = (
            sum(float(t.square().sum()) for t in ts) for ts in ([mine[n] - parts[n] for n in mine], parts.values())
        )
        found = {"cell": name, "losses": losses, "expected": expected, "weights": (distance / size) ** 0.5}
        with (run / "matrix.jsonl").open("a") as file:
            file.write(json.dumps(found | {"resumed": same}) + "\n")
    team.barrier()


def _stepped(run: Path, recipe: Recipe, team: Team, saved: Path | None) -> tuple[Trainer, list[float]]:
    """A trainer after its steps, and their losses; all steps, with a checkpoint between, or only those after it."""
    source, cache = stage.open_source(run / "converted", recipe), Cache(encode.cache_folder(recipe, run))
    trainer = stage.build(recipe, source, team)
    folder, losses = run / f"checkpoints-{recipe.finetune.trainable}", []
    if saved is not None:
        checkpoint.load(trainer.state, checkpoint.newest(folder), team)
    order, steps = Order(cache.counts, 2 if recipe.finetune.micro_batch == 2 else 1, recipe.seed), BEFORE + AFTER
    loader = Loader(cache, order, 8, range(trainer.state.step, steps), rank=team.rank, world=team.world)
    for batches in loader:
        losses.append(trainer.advance(batches).loss)
        if trainer.state.step == BEFORE and team.mesh is not None:
            checkpoint.save(trainer.state, folder, recipe, team, {"model": "", "data": ""})
    return trainer, losses


def stale(run: Path) -> None:
    """A resume in which the second process's file system does not show it the newest checkpoint yet."""
    if launch.rank():
        checkpoint.newest = lambda folder: None
    stage.finetune(small(*LORA, "finetune.steps=4"), run)


def slow_leader(run: Path) -> None:
    """A fit whose first process prepares and estimates for longer than a collective may take."""
    processes.STEP = timedelta(seconds=4)
    estimate = fit.estimate

    def slow(*about):
        time.sleep(8)
        return estimate(*about)

    fit.estimate = slow
    with join(lambda: time.sleep(8)) as team:
        values, words = team.sum([team.rank + 1, 1]), team.gather("ab"[team.rank])
        print(f"joined {values} {words} from {team.broadcast(team.rank)}\n", end="", flush=True)
    fit.fit_subspace(load(None, ["fit_subspace.images=8", "fit_subspace.batch=4", "threads=2"], base="klein-tiny"), run)


def one_fails(run: Path, rank: int, how: str) -> None:
    """``flux2pixel eval`` in which one process fails at work while the other is in a barrier or a collective."""

    def work(*given):
        team = given[-1]
        if team.rank == rank:
            time.sleep(3)
            raise RuntimeError("torn shard") if how == "raise" else UsageError("wrong")
        if rank:
            team.sum([1.0])
        team.barrier()

    evaluation._evaluate = work
    sys.argv = ["flux2pixel", "eval", "--run", str(run)]
    main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, *words = sys.argv[1:]
    if name == "one_fails":
        one_fails(Path(words[0]), int(words[1]), words[2])
    {"kills": kills, "two_ranks": two_ranks, "slow_leader": slow_leader, "stale": stale, "matrix": matrix}[name](
        Path(words[0])
    )
    exit_process(0)
