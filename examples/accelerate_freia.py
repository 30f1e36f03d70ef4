"""Accelerate a FrEIA model in place, compare its outputs, and time it before and after.

    python examples/accelerate_freia.py --channels 64 --size 32 --blocks 8

Parameters and state-dict keys stay the same, so that optimizers and checkpoints still fit.
"""

from __future__ import annotations

import argparse
import timeit

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

import msflow_ext as mx


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    first = nn.Conv2d(channels_in, channels_in, 3, padding=1)
    last = nn.Conv2d(channels_in, channels_out, 1)
    return nn.Sequential(first, nn.ReLU(), last)


@torch.no_grad()
def run(model: nn.Module, x: Tensor, repeats: int = 5) -> tuple[Tensor, Tensor, float]:
    """Return the output, its log-determinant and the shortest time of a call in milliseconds."""
    z, log_det = model(x)
    seconds = timeit.repeat(lambda: model(x), number=1, repeat=repeats)
    return z, log_det, 1000 * min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accelerate a FrEIA model.")
    for name, default in (("channels", 64), ("size", 32), ("blocks", 8), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    model = Ff.SequenceINN(args.channels, args.size, args.size)
    for _ in range(args.blocks):
        model.append(Fm.AllInOneBlock, subnet_constructor=subnet)
    x = torch.randn(args.batch, args.channels, args.size, args.size)

    expected, expected_log_det, before = run(model, x)
    print(mx.accelerate(model))
    z, log_det, after = run(model, x)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-4, atol=1e-2)
    print(f"The outputs agree: largest difference {(z - expected).abs().max():.1e}")
    print(f"FrEIA {before:.2f} ms, accelerated {after:.2f} ms")


if __name__ == "__main__":
    main()
