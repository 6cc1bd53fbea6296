"""The loss by value, the average, and a resume that continues bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from flux2pixel.convert.stage import convert
from flux2pixel.errors import UsageError
from flux2pixel.finetune import stage
from flux2pixel.finetune.ema import PowerEma
from flux2pixel.finetune.loss import flow_matching, variance_reduction
from flux2pixel.recipe import load
from flux2pixel.subspace.estimators import polar
from flux2pixel.subspace.file import write_subspace


def tokens(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def test_loss_by_hand():
    """One token, three channels of two pixels, sigma = 0.5: alpha = 0.5, w = 0.25 / (0.25 + 0.0225)."""
    result = variance_reduction(
        tokens(1, 1, 2, 0, 1, 1),
        tokens(0, 0, 0, 0, 2, 2),
        tokens(2, 2, 4, 0, 1, 1),
        tokens(0, 0, 0, 0, 0, 0),
        torch.tensor([0.5], dtype=torch.float64),
    )
    # Channels: d = (1, 1), d_L = (2, 2): 1/2; d = (2, 0), d_L = (4, 0): 1/2; d = (-1, -1), d_L = (1, 1): -1, clamped.
    assert result.lam.flatten().tolist() == [0.5, 0.5, 0.0]
    w = 0.25 / 0.2725
    assert float(result.weight) == pytest.approx(w)
    # target - x0_hat = d - (1 - w) lam d_L: w on the three live pixels, -1 on two.
    assert float(result.loss) == pytest.approx((w**2 + w**2 + (2 * w) ** 2 + 2) / 6 / 0.25)


def test_gradient_flows_only_through_the_prediction():
    x0, low, low_hat = torch.randn(3, 2, 4, 12)
    prediction = torch.randn(2, 4, 12, requires_grad=True)
    sigma = torch.tensor([0.01, 0.9])
    result = variance_reduction(x0, prediction, low, low_hat, sigma)
    result.loss.backward()
    level = sigma.clamp(min=0.05).view(-1, 1, 1)
    target = x0 - (
        (1 - result.weight).view(-1, 1, 1, 1) * result.lam[..., None] * (low - low_hat).view(2, 4, 3, 4)
    ).view(2, 4, 12)
    assert torch.allclose(prediction.grad, 2 * (prediction.detach() - target) / level**2 / 96, atol=1e-5)


def test_perfect_reference_leaves_plain_flow_matching():
    x0, x0_hat, low = torch.randn(3, 2, 4, 12)
    sigma = torch.rand(2)
    reduced = variance_reduction(x0, x0_hat, low, low, sigma)
    assert torch.allclose(reduced.loss, flow_matching(x0, x0_hat, sigma))


def test_power_ema_profile():
    module = torch.nn.Linear(1, 1, bias=False)
    ema, expected = PowerEma(module, gamma=3.0), 0.0
    for n in range(1, 6):
        torch.nn.init.constant_(module.weight, float(n))
        ema.update(module)
        keep = (1 - 1 / n) ** 4
        expected = keep * expected + (1 - keep) * n
    assert ema.values["weight"].item() == pytest.approx(expected)


@pytest.fixture
def converted(tmp_path):
    path = tmp_path / "subspace.safetensors"
    write_subspace(path, polar(torch.randn(192, 16, dtype=torch.float64)), torch.tensor(1.7), {"method": "random"})
    convert(load(None, ["convert.verify_steps=2"]), tmp_path, path)
    return tmp_path


SMALL = ["finetune.steps=4", "finetune.images=40", "finetune.batch=4", "finetune.save_every=1", "finetune.log_every=1"]


def test_a_killed_run_resumes_bit_for_bit(converted, monkeypatch):
    recipe = load(None, SMALL)
    whole = load_file(stage.finetune(recipe, converted) / "transformer" / "diffusion_pytorch_model.safetensors")
    advance = stage.Trainer.advance

    def killed(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(stage.Trainer, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.finetune(recipe, converted, out=converted / "finetuned2")
    assert (converted / "finetune.ckpt").is_file() and not (converted / "finetuned2").exists()
    monkeypatch.setattr(stage.Trainer, "advance", advance)
    with pytest.raises(UsageError, match="another recipe"):
        stage.finetune(load(None, [*SMALL, "finetune.lr=0.1"]), converted, out=converted / "finetuned2")
    folder = stage.finetune(recipe, converted, out=converted / "finetuned2")
    resumed = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row[0] for row in json.loads((folder / "finetune.json").read_text())["curve"]] == [1, 2, 3, 4]
    assert not (converted / "finetune.ckpt").exists()


def test_training_is_refused_without_a_converted_model(tmp_path):
    with pytest.raises(UsageError, match=r"asymflow\.json"):
        stage.finetune(load(None, SMALL), tmp_path)
