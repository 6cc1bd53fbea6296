"""Claim: the decoder's exact self-block Jacobian by forward mode against reverse mode, and how its cost grows.

    python benchmarks/exact_jacobian.py [--rounds 3]

Reverse mode is ``torch.autograd.functional.jacobian``, on the same decoder and latents, in the same run, interleaved.
``error`` is the relative difference of the two results. The colour stride trades exactness for passes: stride^2 r of
them instead of N r. The decoders are the miniature's VAE, and the same stock class with wider latents.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from flux2pixel.models.base import open_base
from flux2pixel.subspace import jacobian
from flux2pixel.subspace.prior import decode_pixels, prior_latents


def reverse(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Mean self-block Jacobian, from all of the Jacobian."""
    blocks = torch.autograd.functional.jacobian(decode, z)[0, :, :, 0]
    own: Tensor = torch.stack([blocks[i, :, i] for i in range(z.shape[1])]).mean(0)
    return own.double()


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of CPU time of one call (other processes do not count), and what it returned."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[4, 6], help="tokens along a side, against reverse mode"
    )
    parser.add_argument("--growth", type=int, nargs="+", default=[4, 8, 16], help="tokens along a side, forward alone")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    base = open_base("klein-tiny")
    config = dict(base.vae.config)
    for tokens_a_side in args.sides:
        side = tokens_a_side * base.patch_size
        z = prior_latents(base, 1, side, torch.Generator().manual_seed(0))
        grid = (tokens_a_side, tokens_a_side)

        def decode(latent: Tensor, side: int = side) -> Tensor:
            return decode_pixels(base, latent, side, side)

        ways = {"reverse mode": lambda d=decode, z=z: reverse(d, z)}
        for stride in (0, 3, 4):
            ways[f"forward, stride {stride}"] = lambda d=decode, z=z, s=stride, g=grid: jacobian.exact(
                d, z, g, stride=s
            )
        measured = [{name: timed(way) for name, way in ways.items()} for _ in range(args.rounds)]
        wanted = measured[0]["reverse mode"][1]
        print(f"klein-tiny, {side} x {side} pixels, N = {z.shape[1]}, r = {z.shape[2]}, D = {base.token_width}")
        slow = statistics.median(round_["reverse mode"][0] for round_ in measured)
        for name in ways:
            seconds = statistics.median(round_[name][0] for round_ in measured)
            error = float((measured[0][name][1] - wanted).norm() / wanted.norm())
            print(f"  {name:<18} {seconds:8.3f} s   {slow / seconds:6.1f} x reverse mode   error {error:.1e}")
    print("growth of forward mode, stride 4, one image")
    for channels in (4, 8, 16):
        wider = AutoencoderKLFlux2.from_config(config | {"latent_channels": channels}).eval().requires_grad_(False)
        base.vae = wider
        times = []
        for tokens_a_side in args.growth:
            side = tokens_a_side * base.patch_size
            z = torch.randn(1, tokens_a_side**2, 4 * channels)

            def wide(latent: Tensor, side: int = side) -> Tensor:
                return decode_pixels(base, latent, side, side)

            grid = (tokens_a_side, tokens_a_side)
            times.append(timed(lambda d=wide, z=z, g=grid: jacobian.exact(d, z, g, stride=4))[0])
        shown = "   ".join(f"{8 * n} px {t:7.2f} s" for n, t in zip(args.growth, times, strict=True))
        print(f"  r = {4 * channels:<3} {shown}")


if __name__ == "__main__":
    main()
