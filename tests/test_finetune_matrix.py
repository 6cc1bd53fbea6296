"""Every way to train, sharded over gloo processes against one process, and gone on with from a checkpoint."""

import json
import shutil

import pytest
from finetuning import python
from workers import CELLS

CASES = [(world, name) for world, cells in CELLS.items() for name in cells]


@pytest.fixture(scope="module")
def found(prepared_run, tmp_path_factory):
    """What the worker found of every cell, by number of processes and name."""
    rows = {}
    for world in CELLS:
        folder = shutil.copytree(prepared_run, tmp_path_factory.mktemp("matrix") / "run")
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world))
        python(*launcher, "tests/workers.py", "matrix", folder)
        lines = (folder / "matrix.jsonl").read_text().splitlines()
        rows |= {(world, row["cell"]): row for row in map(json.loads, lines)}
    return rows


@pytest.mark.parametrize(("world", "name"), CASES, ids=[f"{world} processes, {name}" for world, name in CASES])
def test_sharded_is_one_process_and_a_resume_is_exact(found, world, name):
    """Losses agree to rounding of the precision; moments of 8 bits are cut into blocks another way when sharded."""
    row = found[world, name]
    rounding = 2e-3 if "bf16" in name else 1e-5
    assert row["losses"] == pytest.approx(row["expected"], rel=rounding)
    # A weight moves by its rate whatever the size of its gradient, so a rounded sign shows: a few of 1e-3 a step.
    assert row["weights"] < (5e-3 if "bf16" in name or "8 bits" in name else 1e-4)
    assert row["resumed"], "the resumed training is another one"
