"""A training that is killed, stopped, resharded or given another recipe."""

import json
import shutil
import sys

import pytest
import torch
from finetuning import LORA, python, small, weights

from flux2pixel.finetune import run as stage
from flux2pixel.finetune.network import checkpoint
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.processes import Team

ALONE = Team(0, 1, torch.device("cpu"))


@pytest.fixture
def fresh(prepared_run, tmp_path):
    return shutil.copytree(prepared_run, tmp_path / "run")


def test_killed_at_several_steps_and_during_a_save_it_ends_bit_for_bit(fresh, tmp_path):
    whole = shutil.copytree(fresh, tmp_path / "whole")
    torch.set_num_threads(1)
    stage.finetune(small("finetune.steps=8", *LORA, "finetune.lora_dropout=0.1"), whole)
    told = python("tests/workers.py", "kills", fresh).stdout.splitlines()
    assert told == [
        "kill 1 none False",
        "term 2 step-00000003 True",  # the step was finished, then saved
        "save 4 step-00000003 False",  # the half-written checkpoint is none
        "kill 5 step-00000004 False",
        "kill 7 step-00000006 False",
        "none 0 none False",
    ]
    for kind in ("transformer", "transformer_raw"):
        once, again = weights(whole / "finetuned", kind), weights(fresh / "finetuned", kind)
        assert once.keys() == again.keys() and all(torch.equal(once[n], again[n]) for n in once), kind
    curves = [json.loads((folder / "finetuned" / "finetune.json").read_text())["curve"] for folder in (whole, fresh)]
    assert curves[0] == curves[1] and [row[0] for row in curves[0]] == list(range(1, 9))


def interrupted(monkeypatch, recipe, run, step=2):
    advance = Trainer.advance

    def killed(self, batches):
        if self.state.step == step:
            raise KeyboardInterrupt
        return advance(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.finetune(recipe, run)
    assert checkpoint.newest(run / "checkpoints").name == f"step-{step:08d}"


def test_a_changed_recipe_is_shown_and_wins_or_is_refused(fresh, monkeypatch, capsys):
    interrupted(monkeypatch, small(), fresh)
    with pytest.raises(UsageError, match=r"another recipe \(seed\)"):
        stage.finetune(small("seed=5"), fresh)
    with pytest.raises(UsageError, match=r"finetune\.trainable"):
        stage.finetune(small(*LORA), fresh)
    capsys.readouterr()
    stage.finetune(small("finetune.lr=0.001", "finetune.steps=3"), fresh)
    said = capsys.readouterr().err
    assert "finetune.lr was 0.0005 at the checkpoint, is 0.001 now" in said
    assert "the recipe wins over the checkpoint from step 2 on" in said
    assert json.loads((fresh / "finetuned" / "finetune.json").read_text())["steps"] == 3


def test_a_checkpoint_of_another_model_or_with_a_cut_file_is_named(fresh, monkeypatch):
    interrupted(monkeypatch, small(), fresh)
    path = checkpoint.newest(fresh / "checkpoints")
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"model": "other"}))
    with pytest.raises(UsageError, match="another converted model"):
        stage.finetune(small(), fresh)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    victim = next(path.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(Flux2PixelError, match=f"{victim.name}: missing or cut"):
        stage.finetune(small(), fresh)


def test_moments_of_8_bits_resume_bit_for_bit(fresh, tmp_path, monkeypatch):
    """torchao's AdamW, in one process and through the whole stage; sharded: test_finetune_matrix."""
    torch.compiler.set_stance("force_eager")  # it compiles its step, which takes longer than all of this
    whole, recipe = shutil.copytree(fresh, tmp_path / "whole"), small(*LORA, "finetune.optimizer=adamw-8bit")
    kinds = []
    save = checkpoint.save

    def seen(state, *rest):
        kinds.extend(type(value).__name__ for entry in state.optimizer.state.values() for value in entry.values())
        return save(state, *rest)

    monkeypatch.setattr(checkpoint, "save", seen)
    try:
        stage.finetune(recipe, whole)
        interrupted(monkeypatch, recipe, fresh)
        stage.finetune(recipe, fresh)
    finally:
        torch.compiler.set_stance("default")
    assert "OptimState8bit" in kinds
    for kind in ("transformer", "transformer_raw"):
        once, again = weights(whole / "finetuned", kind), weights(fresh / "finetuned", kind)
        assert all(torch.equal(once[name], again[name]) for name in once), kind


def test_8_bits_without_torchao_are_refused_not_replaced(prepared_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match=r"adamw-8bit needs torchao .*flux2pixel\[train\]"):
        stage.prepare(small("finetune.optimizer=adamw-8bit"), prepared_run)


@pytest.mark.parametrize(
    "change", ["finetune.optimizer=adamw-8bit", "finetune.loss=flow-matching", "finetune.lora_alpha=8.0"]
)
def test_what_would_make_another_run_is_fixed_at_a_resume(fresh, monkeypatch, change):
    interrupted(monkeypatch, small(*LORA), fresh)
    with pytest.raises(UsageError, match=f"another recipe \\({change.split('=')[0]}\\)"):
        stage.finetune(small(*LORA, change), fresh)


def test_trained_parameters_of_other_groups_are_refused(fresh, monkeypatch):
    interrupted(monkeypatch, small(), fresh)
    path = checkpoint.newest(fresh / "checkpoints") / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["groups"]["rest"].append(manifest["groups"]["in_projection"].pop())
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"not those of the recipe \(group in_projection, rest\)"):
        stage.finetune(small(), fresh)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "is whole, but cannot be loaded now (OutOfMemoryError: out of"),
        (OSError(5, "Input/output error"), "is whole, but cannot be loaded now (OSError: Input/output error)"),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), "is damaged (RuntimeError: PytorchStream"),
    ],
)
def test_a_checkpoint_that_fails_to_load_says_why_and_never_to_delete_it(fresh, monkeypatch, error, said):
    interrupted(monkeypatch, small(), fresh)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.dcp, "load", fail)
    with pytest.raises(Flux2PixelError) as caught:
        stage.finetune(small(), fresh)
    assert said in str(caught.value) and "delete" not in str(caught.value)
    assert checkpoint.newest(fresh / "checkpoints").name == "step-00000002"


def record(run):
    """What a training leaves of itself that is not a matter of time."""
    lines = [json.loads(line) for line in (run / "finetune.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "tokens_per_second", "data_wait", "memory_gib", "save_seconds")
    lines = [{k: v for k, v in line.items() if k not in timed} for line in lines]
    pictures = {path.name: path.read_bytes() for path in sorted((run / "samples").glob("*.png"))}
    return sorted((line for line in lines if len(line) > 1), key=lambda line: (line["step"], len(line))), pictures


@pytest.mark.parametrize("how", ["killed after the save", "killed before the look", "stopped"])
def test_the_record_of_an_interrupted_run_is_that_of_an_uninterrupted_one(fresh, tmp_path, monkeypatch, how):
    """Validation and samples are due at the step of the checkpoint, and lines of the log span it."""
    whole = shutil.copytree(fresh, tmp_path / "whole")
    recipe = small("finetune.steps=6", "finetune.save_every=2", "finetune.sample_every=2", "finetune.log_every=3")
    stage.finetune(recipe, whole)
    save, look, advance = checkpoint.save, stage.Watch.look, Trainer.advance
    with monkeypatch.context() as patched:

        def saved(state, *rest):
            seconds = save(state, *rest)
            if state.step == 4 and how == "killed after the save":
                raise KeyboardInterrupt
            return seconds

        def looked(self, step, last=False):
            if step == 4 and how == "killed before the look":
                raise KeyboardInterrupt
            look(self, step, last)

        def stopped(self, batches):
            self.stop.signal = 15 if how == "stopped" and self.state.step == 3 else 0
            return advance(self, batches)

        patched.setattr(checkpoint, "save", saved)
        patched.setattr(stage.Watch, "look", looked)
        patched.setattr(Trainer, "advance", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            stage.finetune(recipe, fresh)
    stage.finetune(recipe, fresh)
    (once, pictures), (again, redrawn) = record(whole), record(fresh)
    assert once == again
    assert pictures == redrawn and "step-00000004.png" in pictures


def spoil(monkeypatch, names):
    """A batch with one of these images has a NaN latent."""
    load_batch = stage.Loader.load

    def spoiled(self, step):
        batches = load_batch(self, step)
        for batch in batches:
            for row, name in enumerate(batch.names):
                if name in names:
                    batch.latents[row] = float("nan")
        return batches

    monkeypatch.setattr(stage.Loader, "load", spoiled)


def images_of(run, recipe, step):
    """What a step is trained on, by name."""
    cache = stage.open_data(recipe, run)
    order = stage.Order(stage.hold_out(cache, recipe.finetune.validation_images).training(cache), 4, recipe.seed)
    return [name for batch in stage.Loader(cache, order, 8, range(9)).load(step) for name in batch.names]


def test_a_step_that_is_not_finite_is_left_out_aloud_and_resumes_exactly(fresh, tmp_path, monkeypatch, capsys):
    recipe = small()
    bad = images_of(fresh, recipe, 1)[0]
    assert sum(bad in images_of(fresh, recipe, step) for step in range(4)) == 1
    spoil(monkeypatch, {bad})
    whole = shutil.copytree(fresh, tmp_path / "whole")
    stage.finetune(recipe, whole)
    assert "not finite at step 1" in capsys.readouterr().err
    lines = [json.loads(line) for line in (whole / "finetune.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [2]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 4]
    assert any(bad in line.get("skipped", ()) for line in lines)
    interrupted(monkeypatch, recipe, fresh)
    manifest = checkpoint.read_manifest(checkpoint.newest(fresh / "checkpoints"))
    assert manifest["skipped"] == 1
    stage.finetune(recipe, fresh)
    once, again = weights(whole / "finetuned"), weights(fresh / "finetuned")
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert all(torch.isfinite(value).all() for value in once.values())


def test_too_many_in_a_row_end_the_run_also_across_a_resume(fresh, monkeypatch):
    recipe = small("finetune.skip_limit=2", "finetune.save_every=1")
    spoil(monkeypatch, {name for step in (0, 1, 2) for name in images_of(fresh, recipe, step)})
    for _ in range(2):  # started again it is over at once
        with pytest.raises(Flux2PixelError, match=r"at step 2 .* after 2 left out in a row .*data\.exclude"):
            stage.finetune(recipe, fresh)


def test_a_bad_image_is_excluded_and_the_run_goes_on(fresh, monkeypatch, capsys):
    recipe = small("finetune.skip_limit=0", "finetune.save_every=1")
    bad = images_of(fresh, recipe, 1)[0]
    spoil(monkeypatch, {bad})
    with pytest.raises(Flux2PixelError, match="not finite at step 1"):
        stage.finetune(recipe, fresh)
    capsys.readouterr()
    stage.finetune(small("finetune.skip_limit=0", f'data.exclude=["{bad}"]'), fresh)
    said = capsys.readouterr().err
    assert "data.exclude: 1 of 48 images are left out" in said and "data.exclude was []" in said
    with pytest.raises(UsageError, match="no image is called 'nobody'"):
        stage.finetune(small('data.exclude=["nobody"]'), fresh)


def test_other_images_are_accepted_if_the_recipe_says_so(fresh, monkeypatch, capsys):
    interrupted(monkeypatch, small(), fresh)
    fewer = ["finetune.images=40"]
    with pytest.raises(UsageError, match=r"another training cache; set finetune\.accept_new_data = true"):
        stage.finetune(small(*fewer), fresh)
    capsys.readouterr()
    stage.finetune(small(*fewer, "finetune.accept_new_data=true"), fresh)
    said = capsys.readouterr().err
    assert "other images than before step 2; accepted" in said and "finetune.images was 48" in said
    assert json.loads((fresh / "finetuned" / "finetune.json").read_text())["images"] == 40


def test_one_process_chooses_the_checkpoint(fresh, monkeypatch):
    """The others take the leading one's, whatever their own view of the file system is."""
    seen = []
    broadcast = Team.broadcast
    monkeypatch.setattr(Team, "broadcast", lambda self, value: (seen.append(value), broadcast(self, value))[1])
    interrupted(monkeypatch, small(), fresh)
    stage.finetune(small(), fresh)
    assert fresh / "checkpoints" / "step-00000002" in seen


def test_checkpoints_are_kept_by_policy_and_the_last_one_if_asked(fresh):
    recipe = small("finetune.save_every=1", "finetune.keep=2", "finetune.keep_final=true")
    stage.finetune(recipe, fresh)
    assert [p.name for p in sorted((fresh / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]
    longer = small("finetune.save_every=1", "finetune.steps=5")
    stage.finetune(longer, fresh)
    record = json.loads((fresh / "finetuned" / "finetune.json").read_text())
    assert record["steps"] == 5 and record["images_seen"] == 40
    assert not (fresh / "checkpoints").exists()
