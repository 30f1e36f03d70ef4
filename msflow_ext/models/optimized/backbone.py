"""Optimized backbone: batch norm, addition and activation are fused into the convolution before them."""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from msflow_ext.hardware import has_bfloat16
from msflow_ext.models.conv.packed import PackedConv2d
from msflow_ext.models.optimized.packing import Optimized

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)

#: Modules that do nothing in evaluation mode.
NOTHING = (nn.Identity, nn.Dropout, DropPath)

ADDITIONS = (operator.add, operator.iadd, torch.add)

#: Names of activations in packed convolutions, by module and function.
ACTIVATION_NAMES: dict[Any, str] = {
    nn.ReLU: "relu",
    F.relu: "relu",
    torch.relu: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


#: Largest error of a backbone's features in bfloat16, in their standard deviations.
MOST_ROUNDING = 0.02

log = logging.getLogger(__name__)


class OptimizedBackbone(Optimized):
    """Copy of a backbone for inference, see :meth:`~msflow_ext.models.backbone.Backbone.optimize`.

    Args:
        backbone: the original, which does not change.
        image_size: side of the images in pixels.
        dtype: float32 (None) or bfloat16.
    """

    # Attributes of the original:
    name: str
    mean: Tensor
    network: nn.Module
    strides: tuple[int, ...]
    image_size: tuple[int, int] | None

    def __init__(self, backbone: nn.Module, image_size: int, dtype: torch.dtype | None) -> None:
        super().__init__(backbone, dtype or torch.float32)
        side = max(2 * self.strides[-1], min(image_size, 256))
        self._example = self.image_size or (side, side)
        self.packed()

    def _pack(self) -> tuple[nn.Module, torch.dtype]:
        """Return the optimized network and the dtype of its input."""
        dtype, cpu = self.dtype, self.mean.is_cpu
        if dtype is torch.bfloat16 and self.image_size is not None and cpu and not has_bfloat16():
            dtype = torch.float32
        example = torch.randn(1, 3, *self._example, generator=torch.Generator().manual_seed(0))
        example = example.to(self.mean)  # device and dtype
        network = optimize_network(self.network, example, dtype)
        if dtype is torch.bfloat16:
            # A copy, because the weights packed for this size are not needed later.
            found = copy.deepcopy(network)(example.to(dtype))
            error = _deviation(found, self.network(example))
            if error > MOST_ROUNDING:
                text = "features of %s err by %.0f%% in bfloat16: its backbone stays in float32"
                log.warning(text, self.name, 100 * error)
                dtype = torch.float32
                network = optimize_network(self.network, example, dtype)
        return network, dtype

    def _maps(self, normalized: Tensor) -> list[Tensor]:
        network, dtype = self.packed()
        return network(normalized.to(dtype))


def _deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the root mean square error over the standard deviation, of the worst scale."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).square().mean().sqrt() / b.std()) for a, b in pairs)


@torch.no_grad()
def optimize_network(network: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a frozen network with packed convolutions, fused with the layers that follow them.

    A trace (``torch.fx``) shows which batch norm, residual addition and activation follow which convolution. If a
    network cannot be traced, or its results change, its convolutions are packed without fusion.

    Args:
        network: a network in evaluation mode, which returns a tensor or a list of tensors.
        example: ``(1, C, H, W)`` in the network's dtype, on which the results of the copy are compared.
        dtype: dtype of weights and activations, float32 or bfloat16.

    Returns:
        The copy, channels_last.
    """
    batch = torch.cat([example, example])  # two images, so that a batch of one is no special case
    expected = _results(network, batch)
    for form in (_fuse, _pack):
        try:
            copied = form(copy.deepcopy(network), batch)
            found = _results(copy.deepcopy(copied), batch)
            copied = _converted(copied, dtype)
            dtypes = {result.dtype for result in _results(copy.deepcopy(copied), batch.to(dtype))}
        except Exception:  # the trace failed, or code reads what a packed convolution lacks
            continue
        if dtypes == {dtype} and all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
            for a, b in zip(found, expected, strict=True)
        ):
            return copied
    return _converted(copy.deepcopy(network), dtype)


def _converted(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    network.to(dtype)
    for part in network.modules():
        if isinstance(part, PackedConv2d):
            part.dtype = dtype
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return network


def _results(network: nn.Module, batch: Tensor) -> list[Tensor]:
    results = network(batch)
    return [results] if isinstance(results, Tensor) else list(results)


class _Tracer(fx.Tracer):
    """Tracer of a network that treats convolutions, batch norms and what timm cannot trace as leaves."""

    def __init__(self) -> None:
        super().__init__(
            autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True
        )
        self.leaves = (nn.Conv2d, _BatchNorm, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def _fuse(network: nn.Module, batch: Tensor) -> nn.Module:
    traced = fx.GraphModule(network, _Tracer().trace(network))
    ShapeProp(traced).propagate(batch)
    for node in traced.graph.nodes:
        if type(_module(node)) in NOTHING:
            _erase(node, node.args[0])
    calls = Counter(node.target for node in traced.graph.nodes)
    count = len(traced.graph.nodes)
    for node in traced.graph.nodes:
        conv = _module(node)
        if type(conv) in CONVOLUTIONS and calls[node.target] == 1:
            _fuse_norm(node, calls)
            _fuse_addition(node)
            activation = _fuse_activation(node)
            packed = PackedConv2d(conv, batch.dtype, activation=activation)
            traced.set_submodule(node.target, packed)
    if len(traced.graph.nodes) == count:
        return _pack(network, batch)  # nothing was fused: the network's own code is safer
    traced.recompile()
    return _pack(traced, batch)


def _pack(network: nn.Module, batch: Tensor) -> nn.Module:
    modules: list[tuple[str, Any]] = list(network.named_modules())
    for name, module in modules:
        if type(module) in CONVOLUTIONS:
            network.set_submodule(name, PackedConv2d(module, batch.dtype))
    return network


def _fuse_norm(node: fx.Node, calls: Counter[Any]) -> None:
    """Fold a batch norm into the convolution before it."""
    user = _only_user(node)
    conv, norm = _module(node), _module(user)
    if user is None or not isinstance(norm, _BatchNorm) or calls[user.target] != 1:
        return
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias
    )
    activation = getattr(norm, "act", None)  # timm's batch norms contain their activation
    if activation is None or type(activation) in NOTHING:
        _erase(user, node)
    else:
        network: Any = user.graph.owning_module
        network.set_submodule(user.target, activation)


def _fuse_addition(node: fx.Node) -> None:
    """Fuse the addition of a tensor of the same shape, computed earlier, into the convolution before it."""
    user = _only_user(node)
    if user is None or user is not node.next or user.target not in ADDITIONS or user.kwargs:
        return
    others = [arg for arg in user.args if arg is not node]
    if len(others) == 1 and isinstance(others[0], fx.Node) and _shape(others[0]) == _shape(node):
        node.args = (*node.args, others[0])
        _erase(user, node)


def _fuse_activation(node: fx.Node) -> str:
    """Remove the activation that follows a convolution, and return its name."""
    user = _only_user(node)
    name = None
    if user is not None:
        name = ACTIVATION_NAMES.get(type(_module(user)), ACTIVATION_NAMES.get(user.target))
    if user is None or name is None:
        return "none"
    _erase(user, node)
    return name


def _module(node: fx.Node | None) -> Any:
    """Return the module that a node calls, or None."""
    if node is None or node.op != "call_module":
        return None
    network: Any = node.graph.owning_module
    return network.get_submodule(node.target)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: fx.Node) -> torch.Size | None:
    return getattr(node.meta["tensor_meta"], "shape", None)


def _erase(node: fx.Node, instead: Any) -> None:
    node.replace_all_uses_with(instead)
    node.graph.erase_node(node)
