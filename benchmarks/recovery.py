"""Claim: recovering x0_hat takes at most 0.3 of the time and half of the temporary memory of the two-branch form.

    python benchmarks/recovery.py [--tokens 4096] [--repeats 30] [--threads 1]

Both sides turn the network's output into the clean image at (1, tokens, 768), rank 128, float32, in turn, in one run.
The peer is the paper's own expression (arXiv 2605.12964), written as it stands there, with the projector P = A A^T:

    u = P [s k v + (1 - s) k x] + (I - P) [x + s v] / sigma        x0_hat = x - sigma u

once with P as a matrix, made beforehand, and once with the two skinny products. Errors are against float64, worst of
three noise levels. Temporary memory is the peak of the allocator's own events, the result included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flux2pixel.asymflow.linalg import polar
from flux2pixel.asymflow.method import AsymFlow

WIDTH, RANK, SCALE = 768, 128, 1.3
Recover = Callable[[Tensor, Tensor, Tensor], Tensor]


def two_branches(project: Callable[[Tensor], Tensor], scale: float) -> Recover:
    """The paper's form with ``project`` for P."""

    def recover(v: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.view(-1, 1, 1)
        k = 1 / (scale * (1 - sigma) + sigma)
        low = scale * k * v + (1 - scale) * k * x
        high = (x + scale * v) / sigma
        u = project(low) + (high - project(high))
        return x - sigma * u

    return recover


def seconds(recover: Recover, *given: Tensor) -> float:
    began = time.perf_counter()
    recover(*given)
    return time.perf_counter() - began


def peak_bytes(recover: Recover, *given: Tensor) -> int:
    """Largest sum of live allocations while ``recover`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = recover(*given)
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert result is not None
    return max(accumulate(changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    exact = polar(torch.randn(WIDTH, RANK, dtype=torch.float64))
    basis = exact.float()
    matrix = basis @ basis.mT
    flow = AsymFlow(basis, SCALE)
    forms: dict[str, Recover] = {
        "one projection": flow.predict_x0,
        "two branches, P a matrix": two_branches(lambda y: y @ matrix, SCALE),
        "two branches, P = A A^T": two_branches(lambda y: (y @ basis) @ basis.mT, SCALE),
    }
    v, x = torch.randn(2, 1, args.tokens, WIDTH)
    truth = two_branches(lambda y: (y @ exact) @ exact.mT, SCALE)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(args.repeats + 3):
        for name, recover in forms.items():
            taken = seconds(recover, v, x, torch.tensor([0.5]))
            if turn >= 3:
                times[name].append(taken)
    ours = statistics.median(times["one projection"])
    our_memory = peak_bytes(flow.predict_x0, v, x, torch.tensor([0.5]))
    print(f"(1, {args.tokens}, {WIDTH}), rank {RANK}, float32, {args.threads} thread(s), medians of {args.repeats}")
    for name, recover in forms.items():
        taken, memory = statistics.median(times[name]), peak_bytes(recover, v, x, torch.tensor([0.5]))
        levels = [torch.tensor([level]) for level in (0.01, 0.5, 0.99)]
        error = max((recover(v, x, s) - truth(v.double(), x.double(), s.double())).abs().max().item() for s in levels)
        print(
            f"{name:26} {1e3 * taken:7.2f} ms  {memory / 1e6:6.1f} MB  error {error:.1e}"
            f"   ours / this: time {ours / taken:.2f}, memory {our_memory / memory:.2f}"
        )


if __name__ == "__main__":
    main()
