"""``accelerate`` makes models of other packages run on our kernels, and ``restore`` undoes it."""

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

#: The new class of a module, and the facts that the class needs.
_Plan = dict[nn.Module, tuple[type[Accelerated], Any]]


@dataclass(frozen=True)
class AccelerationReport:
    """Result of :func:`accelerate`, by the modules' names in ``named_modules()``.

    Attributes:
        replaced: coupling blocks that run on our kernels now.
        kept: coupling blocks that run as before, and why.
        fused: what else became faster with them, and how.
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
    """Make the coupling blocks inside ``module`` run on our kernels, in place; :func:`restore` undoes it.

    It knows ``AllInOneBlock`` of FrEIA 0.2, of FrEIA's master and of anomalib (FastFlow, U-Flow, C-Flow, PatchFlow),
    chains of them in FrEIA's ``SequenceINN``, MSFlow's subnet of convolution, LayerNorm and convolution, and CS-Flow's
    coupling. Modules stay the same objects with the same parameters, hooks and state-dict keys, so optimisers go on;
    only their class changes, to a subclass with another forward. Copies and pickles stay accelerated. In half
    precision the state keeps the dtype in which it came, and log-determinants are float32. Under ``torch.export``,
    ONNX export and tracing the original forward runs.

    Args:
        module: anything that holds such blocks, or one itself.
        verify: compare also the inverse and all gradients of every block with the original's. Forward and
            log-determinant are always compared, on copies in float64, on random numbers and with a random subnet:
            no subnet of the model runs, nothing of it changes, and no random number of the program is drawn.

    Returns:
        Names of what was replaced and fused, and of what was kept with the reason.

    Raises:
        TypeError: ``module`` is no ``nn.Module``. ValueError: it holds nothing that can be replaced, or an accelerated
            block gives other results than the original; then nothing is changed.

    Examples:
        >>> from FrEIA.modules import AllInOneBlock  # extra compat
        >>> block = AllInOneBlock([(8, 4, 4)], subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1))
        >>> model = nn.ModuleDict({"block": block})
        >>> print(accelerate(model))
        replaced 1: block
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
            report.kept[name] = "it is MSFlow's fusion layer, whose convolutions take its time"
        if kind is None:
            continue
        try:
            plan[m] = (kind.form, _facts_of(m, kind, verify))
            report.replaced.append(name)
        except _KeptError as reason:
            report.kept[name] = str(reason)
        except MismatchError as error:
            raise ValueError(
                f"accelerate: {_shown(name)} would give other results, {error}; nothing was changed"
            ) from error
    if not plan and ALREADY not in report.kept.values():
        reasons = [f"{_shown(name)}: {reason}" for name, reason in report.kept.items()]
        known = "no AllInOneBlock of FrEIA or anomalib and no coupling of CS-Flow"
        raise ValueError(
            f"accelerate: nothing to replace in {type(module).__name__}, "
            + ("; ".join(reasons) or f"it holds {known}")
        )
    _fuse(module, plan, report)
    for m, (form, facts) in plan.items():
        switch(m, form, facts)
    return report


def restore(module: nn.Module) -> None:
    """Give the modules inside ``module`` that :func:`accelerate` replaced their own forward back, in place.

    Raises:
        ValueError: the class of one was changed once more since then, as parametrizations do.

    Examples:
        >>> from FrEIA.modules import AllInOneBlock
        >>> block = AllInOneBlock([(8, 4, 4)], subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1))
        >>> report = accelerate(block)
        >>> restore(block)
        >>> type(block) is AllInOneBlock
        True
    """
    accelerated = {name: m for name, m in module.named_modules() if isinstance(m, Accelerated)}
    for name, m in accelerated.items():
        if "_original" not in vars(type(m)):
            raise ValueError(
                f"restore: the class of {_shown(name)} was changed after accelerate; undo that change first"
            )
    for m in accelerated.values():
        switch_back(m)


ALREADY = "it is already accelerated"


@dataclass(frozen=True)
class _Kind:
    """How modules are recognised: what they have, and which functions one class must define together."""

    form: type[Accelerated]
    attributes: tuple[str, ...]
    functions: tuple[str, ...]

    def fits(self, m: nn.Module) -> bool:
        return all(hasattr(type(m), f) for f in self.functions) and all(
            hasattr(m, a) for a in self.attributes
        )

    def override(self, m: nn.Module) -> str | None:
        """Return the class of ``m`` that overrides some of the functions but not all, as a sentence, or None."""
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
    """A module is left as it is; the message says why."""


def _facts_of(m: Any, kind: _Kind, verify: bool) -> Any:
    """Return the facts of ``m`` for its accelerated class, after a comparison of results.

    Raises:
        _KeptError: ``m`` cannot be replaced. MismatchError: the results differ.
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
        return f"its clamp is {m.clamp!r}, no positive number"
    if kind is _BLOCK and m.householder:
        return "its permutation is learned by Householder reflections, which no kernel computes"
    if kind is _BLOCK and m.GIN:
        return "it is a GIN block, whose coupling no kernel computes"
    if kind is _GLOW and len(m.dims_in) != 3:
        return f"it couples {len(m.dims_in)} scales, not three"
    return None


def _is_fusion_layer(m: nn.Module) -> bool:
    sides = (getattr(m, side, None) for side in ("subnet_1", "subnet_2"))
    parts = ("cross_convs", "conv_s", "conv_t")
    return all(hasattr(side, part) for side in sides for part in parts)


def _fuse(module: nn.Module, plan: _Plan, report: AccelerationReport) -> None:
    """Add to the plan subnets with an accelerated norm, and sequences of only accelerated blocks."""
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
            report.kept[name] = f"only its parts are accelerated: as a whole {error}"


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
