"""A training that is killed, stopped, resharded or given another recipe."""

import json
import shutil

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


def test_checkpoints_are_kept_by_policy_and_the_last_one_if_asked(fresh):
    recipe = small("finetune.save_every=1", "finetune.keep=2", "finetune.keep_final=true")
    stage.finetune(recipe, fresh)
    assert [p.name for p in sorted((fresh / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]
    longer = small("finetune.save_every=1", "finetune.steps=5")
    stage.finetune(longer, fresh)
    record = json.loads((fresh / "finetuned" / "finetune.json").read_text())
    assert record["steps"] == 5 and record["images_seen"] == 40
    assert not (fresh / "checkpoints").exists()
