"""Run models of other packages on the kernels of msflow_ext with ``accelerate``; undo it with ``restore``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from msflow_ext.activations import is_plain
from msflow_ext.compat.accelerated.blocks import (
    BlockFacts,
    FastBlock,
    FastGlowCoupling,
    FastSequence,
    FastSubnet,
)
from msflow_ext.compat.accelerated.swap import Accelerated, switch, switch_back
from msflow_ext.compat.accelerated.verify import (
    MismatchError,
    UntriedError,
    try_block,
    try_glow_coupling,
    try_sequence,
    try_subnet,
)

#: The class that each module gets, and the facts that this class needs about the module.
_Plan = dict[nn.Module, tuple[type[Accelerated], Any]]


@dataclass(frozen=True)
class AccelerationReport:
    """Result of :func:`accelerate`, by the modules' names in ``named_modules()``.

    Attributes:
        replaced: coupling blocks that now run on the kernels of msflow_ext.
        kept: coupling blocks that run as before, with the reason.
        fused: subnets and chains that became faster too, with the change.
    """

    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}: {', '.join(map(_shown, self.replaced))}"]
        for title, entries in (("kept", self.kept), ("fused", self.fused)):
            lines += [f"{title} {_shown(name)}: {what}" for name, what in entries.items()]
        return "\n".join(lines)


def accelerate(module: nn.Module, *, verify: bool = True) -> AccelerationReport:
    """Run the coupling blocks inside ``module`` on the kernels of msflow_ext, in place.

    :func:`restore` undoes it. Supported are:

    * ``AllInOneBlock`` of FrEIA 0.2, of FrEIA's master and of anomalib (FastFlow, U-Flow, C-Flow, PatchFlow);
    * chains of them in FrEIA's ``SequenceINN``;
    * MSFlow's subnet of convolution, LayerNorm and convolution;
    * CS-Flow's coupling.

    Modules stay the same objects with the same parameters, hooks and state-dict keys, so optimizers keep working. Only
    their class changes, to a subclass with another forward. Copies and pickles stay accelerated. In half precision,
    outputs keep the dtype of the inputs, and log-determinants are float32. Under ``torch.export``, ONNX export and
    tracing, the original forward runs.

    Every block is compared with the original before it is replaced. The comparison runs on float64 copies with random
    inputs and a random subnet. It runs no subnet of the model, changes no state of it, and draws no random numbers of
    the program.

    Args:
        module: a module that contains such blocks, or a block.
        verify: also compare the inverse and all gradients of every block. Outputs and log-determinants are always
            compared.

    Returns:
        The names of replaced and fused modules, and of kept ones with the reason.

    Raises:
        TypeError: if ``module`` is not an ``nn.Module``.
        ValueError: if ``module`` has no block that can be replaced, or an accelerated block gives other results than
            the original. ``module`` is then unchanged.

    Examples:
        >>> from FrEIA.framework import SequenceINN
        >>> from FrEIA.modules import AllInOneBlock
        >>> from torch import nn
        >>> import msflow_ext as mx
        >>> def subnet(channels_in, channels_out):
        ...     return nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> flow = SequenceINN(8, 16, 16)
        >>> for _ in range(2):
        ...     flow.append(AllInOneBlock, subnet_constructor=subnet)
        >>> print(mx.accelerate(flow))
        replaced 2: module_list.0, module_list.1
        fused the module itself: a chain without cat and split between the blocks
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"accelerate: module must be a torch.nn.Module, got {type(module).__name__}"
        )
    report = AccelerationReport()
    plan: _Plan = {}
    for name, m in module.named_modules():
        kind = next((kind for kind in (_BLOCK, _GLOW) if kind.fits(m)), None)
        if _is_fusion_layer(m):
            report.kept[name] = "it is MSFlow's fusion layer, which spends its time in convolutions"
        if kind is None:
            continue
        try:
            plan[m] = (kind.form, _facts_of(m, kind, verify))
            report.replaced.append(name)
        except _KeptError as reason:
            report.kept[name] = str(reason)
        except MismatchError as error:
            raise ValueError(
                f"accelerate: {_shown(name)} must give the same results, but {error}; "
                "the module is unchanged"
            ) from error
    if not plan and ALREADY not in report.kept.values():
        reasons = "; ".join(f"{_shown(name)}: {reason}" for name, reason in report.kept.items())
        raise ValueError(
            "accelerate: module must contain an AllInOneBlock of FrEIA or anomalib, or a coupling of "
            f"CS-Flow, that can be replaced, got {type(module).__name__}"
            + (f" ({reasons})" if reasons else "")
        )
    _fuse(module, plan, report)
    for m, (form, facts) in plan.items():
        switch(m, form, facts)
    return report


def restore(module: nn.Module) -> None:
    """Undo :func:`accelerate` for all modules inside ``module``, in place.

    Args:
        module: a module that contains accelerated blocks, or a block.

    Raises:
        ValueError: if the class of a module was changed after :func:`accelerate`, as by a parametrization.

    Examples:
        >>> from FrEIA.modules import AllInOneBlock
        >>> from torch import nn
        >>> import msflow_ext as mx
        >>> block = AllInOneBlock([(8, 16, 16)], subnet_constructor=lambda a, b: nn.Conv2d(a, b, 1))
        >>> report = mx.accelerate(block)
        >>> type(block).__name__
        'AcceleratedAllInOneBlock'
        >>> mx.restore(block)
        >>> type(block).__name__
        'AllInOneBlock'
    """
    accelerated = {name: m for name, m in module.named_modules() if isinstance(m, Accelerated)}
    for name, m in accelerated.items():
        if "_original" not in vars(type(m)):
            raise ValueError(
                f"restore: the class of {_shown(name)} was changed after accelerate; undo that first"
            )
    for m in accelerated.values():
        switch_back(m)


ALREADY = "it is already accelerated"


@dataclass(frozen=True)
class _Kind:
    """The attributes by which a kind of module is recognized, and the functions that one class must define together."""

    form: type[Accelerated]
    attributes: tuple[str, ...]
    functions: tuple[str, ...]

    def fits(self, m: nn.Module) -> bool:
        return all(hasattr(type(m), f) for f in self.functions) and all(
            hasattr(m, a) for a in self.attributes
        )

    def override(self, m: nn.Module) -> str | None:
        """Return which functions a class of ``m`` overrides if it overrides some of them, else None."""
        classes = type(m).__mro__
        owners = {f: next(c for c in classes if f in vars(c)) for f in self.functions}
        first = min(owners.values(), key=classes.index)
        changed = [f for f, owner in owners.items() if owner is first]
        if len(changed) == len(owners):
            return None
        return f"its class {first.__name__} overrides {', '.join(changed)}"


_BLOCK = _Kind(
    FastBlock,
    (
        *("subnet", "splits", "in_channels", "dims_in", "dims_c", "conditional", "clamp", "GIN"),
        *("condition_channels", "reverse_pre_permute", "householder", "permute_function"),
        *("w_perm", "w_perm_inv", "global_scale", "global_offset", "global_scale_activation"),
    ),
    ("forward", "_affine", "_permute", "_pre_permute"),
)
_GLOW = _Kind(
    FastGlowCoupling,
    ("cross_convolution1", "cross_convolution2", "split_len1", "split_len2", "clamp", "dims_in"),
    ("forward", "log_e", "exp"),
)
_SEQUENCE = _Kind(
    FastSequence,
    ("module_list", "conditions", "shapes", "force_tuple_output"),
    ("forward", "append"),
)


class _KeptError(Exception):
    """The reason why a module is not replaced."""


def _facts_of(m: Any, kind: _Kind, verify: bool) -> Any:
    """Compare ``m`` with its accelerated form, and return the facts that this form needs.

    Raises:
        _KeptError: if ``m`` cannot be replaced.
        MismatchError: if the results differ.
    """
    if (reason := _reason_to_keep(m, kind)) is not None:
        raise _KeptError(reason)
    try:
        return try_block(m, full=verify) if kind is _BLOCK else try_glow_coupling(m)
    except UntriedError as error:
        raise _KeptError(f"it cannot be run for comparison: {error}") from error


def _reason_to_keep(m: Any, kind: _Kind) -> str | None:
    if isinstance(m, Accelerated):
        return ALREADY
    if is_parametrized(m):
        return "it is parametrized"
    if "forward" in vars(m):
        return "its forward was replaced on the instance"
    if (override := kind.override(m)) is not None:
        return override
    if any(p.is_meta for p in m.parameters()):
        return "it is on the meta device, where nothing can be compared"
    if not isinstance(m.clamp, (int, float)) or not m.clamp > 0:
        return f"its clamp must be a positive number, got {m.clamp!r}"
    if kind is _BLOCK and m.householder:
        return "it has learned reflections, for which there is no kernel"
    if kind is _BLOCK and m.GIN:
        return "it is a GIN block, for which there is no kernel"
    if kind is _GLOW and len(m.dims_in) != 3:
        return f"it must couple three scales, got {len(m.dims_in)}"
    return None


def _is_fusion_layer(m: nn.Module) -> bool:
    sides = (getattr(m, side, None) for side in ("subnet_1", "subnet_2"))
    parts = ("cross_convs", "conv_s", "conv_t")
    return all(hasattr(side, part) for side in sides for part in parts)


def _fuse(module: nn.Module, plan: _Plan, report: AccelerationReport) -> None:
    """Add to the plan the subnets whose norm has a kernel, and the sequences that consist of fast blocks."""
    facts: dict[nn.Module, BlockFacts] = {
        m: f for m, (form, f) in plan.items() if form is FastBlock
    }
    subnets = {m.subnet for m in facts}
    facts |= {m: m._accelerated for m in module.modules() if isinstance(m, FastBlock)}
    for name, m in module.named_modules():
        if isinstance(m, Accelerated):
            continue
        try:
            if m in subnets and _has_norm(m):
                try_subnet(m)
                plan[m] = (FastSubnet, None)
                report.fused[name] = "LayerNorm and ReLU in one pass"
            elif _is_chain(m, facts):
                try_sequence(m, facts)
                plan[m] = (FastSequence, None)
                report.fused[name] = "a chain without cat and split between the blocks"
        except (MismatchError, UntriedError) as error:
            report.kept[name] = f"only its parts are accelerated, because {error}"


def _has_norm(m: Any) -> bool:
    children = dict(m.named_children())
    conv1, ln, conv2 = (children.pop(name, None) for name in ("conv1", "ln", "conv2"))
    return (
        isinstance(conv1, nn.Conv2d)
        and isinstance(conv2, nn.Conv2d)
        and isinstance(ln, nn.LayerNorm)
        and ln.normalized_shape == (conv1.out_channels,)
        and ln.weight is not None
        and ln.bias is not None
        and is_plain(m)
        and not any(True for child in children.values() for _ in child.parameters())
    )


def _is_chain(m: Any, facts: dict[nn.Module, BlockFacts]) -> bool:
    return (
        _SEQUENCE.fits(m)
        and _SEQUENCE.override(m) is None
        and "forward" not in vars(m)
        and len(m.module_list) > 1
        and all(block in facts for block in m.module_list)
        and all(facts[block].perm is not None for block in m.module_list)
        and not any(block.reverse_pre_permute for block in m.module_list)
    )


def _shown(name: str) -> str:
    return name or "the module itself"
