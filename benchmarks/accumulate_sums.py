"""Claim: the sums of 200 000 token pairs (D = 768, r = 128) cost a fraction of what their peers take.

    python benchmarks/accumulate_sums.py [--tokens 204800] [--rounds 3]

CPU time measured in one run, interleaved, medians of the rounds, per token: ``Moments.add`` against scikit-learn's
``IncrementalPCA.partial_fit`` (which gives no cross-covariance), against plain float64 products and against plain
float32 products; and the rate of ``Moments.add``, both symmetric halves counted, against a square float32 product's.
Each peer sees tokens enough for a steady figure: all of them take the same time for every block. Peak memory is that
of one block and the totals, whatever the number of images; it is printed after 1 and after 11 images.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.decomposition import IncrementalPCA

from flux2pixel.subspace.moments import Moments

WIDTH, RANK, IMAGE = 768, 128, 4096


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call over all threads: unlike wall time, it does not count what other processes take."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, IMAGE, WIDTH, generator=draw)
    z = torch.randn(1, IMAGE, RANK, generator=draw)
    square = torch.randn(2048, 2048, generator=draw)
    blocks = -(-args.tokens // IMAGE)
    moments = Moments.zeros(WIDTH, RANK)
    flat_x, flat_z, x_numpy = x[0], z[0], x[0].numpy()
    totals = [torch.zeros(WIDTH + RANK, WIDTH + RANK, dtype=torch.float64) for _ in range(2)]
    incremental = IncrementalPCA(RANK).fit(x_numpy)

    def plain(dtype: torch.dtype, total: torch.Tensor) -> None:
        left, right = flat_x.to(dtype), flat_z.to(dtype)
        total[:WIDTH] += torch.cat([left.mT @ left, left.mT @ right], 1)
        total[WIDTH:, WIDTH:] += right.mT @ right
        total[0, 0] += left.sum(0)[0] + right.sum(0)[0]

    work: dict[str, tuple[int, Callable[[], object]]] = {
        "Moments.add": (blocks, lambda: moments.add(x, z)),
        "plain float64 products": (12, lambda: plain(torch.float64, totals[0])),
        "plain float32 products": (12, lambda: plain(torch.float32, totals[1])),
        "IncrementalPCA.partial_fit": (4, lambda: incremental.partial_fit(x_numpy)),
        "float32 square product": (6, lambda: square @ square),
    }
    moments.add(x, z)
    memory = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    for _ in range(10):
        moments.add(x, z)
    memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.rounds):
        # Interleaved call by call, so that what else the machine does falls on all alike.
        spent = dict.fromkeys(work, 0.0)
        for step in range(max(count for count, _ in work.values())):
            for name, (count, call) in work.items():
                if step % max(blocks // count, 1) == 0:
                    spent[name] += seconds(call) / (-(-blocks // max(blocks // count, 1)))
        for name, each in spent.items():
            taken[name].append(each)
    median = {name: statistics.median(values) for name, values in taken.items()}
    ours = median["Moments.add"]
    for name, each in median.items():
        print(f"{name:<28} {1e3 * each:9.2f} ms a block of {IMAGE} tokens   {each / ours:6.2f} x Moments.add")
    useful = 2 * IMAGE * (WIDTH**2 + WIDTH * RANK + RANK**2) / ours
    limit = 2 * 2048**3 / median["float32 square product"]
    print(f"rate, both halves counted: {useful / 1e9:.1f} GFLOP/s of {limit / 1e9:.1f} measured: {useful / limit:.0%}")
    print(f"peak memory: {memory[0] >> 10} MiB after 1 image, {memory[1] >> 10} MiB after 11")


if __name__ == "__main__":
    main()
