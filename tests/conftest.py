import pytest
import torch


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(2)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory):
    """A run directory that a training can start in: converted miniature, cache, prompts. To be copied, not changed."""
    from finetuning import new_run, small

    from flux2pixel.finetune import run as stage

    torch.set_num_threads(1)
    folder = new_run(tmp_path_factory.mktemp("prepared"))
    stage.prepare(small(), folder)
    return folder
