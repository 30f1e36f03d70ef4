"""Build a flow from your own subnet, check its gradients, and train it on features of photos.

Run it on a folder of photos: python examples/own_subnet.py normal --steps 10
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import msflow_ext as mx
from msflow_ext.flows import AffineCoupling, Flow
from msflow_ext.models.backbone import Backbone


def subnet(channels: int) -> nn.Module:
    """Return any module that keeps height and width; it computes a scale and a shift per channel."""
    spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    return nn.Sequential(spatial, nn.GELU(), nn.Conv2d(channels, 2 * channels, 1))


def make_flow(channels: int, blocks: int) -> Flow:
    subnets = (subnet(channels // 2) for _ in range(blocks))
    return Flow([AffineCoupling(channels, s, clamp=2.0, clamp_form="0.2") for s in subnets])


def negative_log_likelihood(flow: nn.Module, x: Tensor) -> Tensor:
    z, _, log_det = flow(x)
    return (mx.ops.half_square_norm(z) - log_det).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a flow with its own subnet.")
    parser.add_argument("normal", help="folder of photos of good parts")
    parser.add_argument("--steps", type=int, default=10, help="training steps")
    args = parser.parse_args()

    x, small = torch.randn(2, 4, 3, 3).double().requires_grad_(), make_flow(4, 2).double()
    assert torch.autograd.gradcheck(lambda x: negative_log_likelihood(small, x), x)
    print("The gradients agree with finite differences")
    dataset = mx.open_dataset(None, "folder", normal=args.normal)
    images = mx.data.Images(dataset.train, 64)
    batch = torch.stack([images[i] for i in range(len(images))])
    (features,) = Backbone("efficientnet_lite0", out_indices=(2,))(batch)
    torch.manual_seed(0)
    flow = make_flow(features.shape[1], blocks=4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for step in range(args.steps):
        loss = negative_log_likelihood(flow, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.1f} nats per image")


if __name__ == "__main__":
    main()
