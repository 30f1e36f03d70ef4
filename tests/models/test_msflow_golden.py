"""MSFlow gives the numbers of the authors' system: every tensor recorded from their code, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msflow_ext import MSFlowHead, ops
from msflow_ext.compat.checkpoints.msflow import head_from_state_dict, to_reference_names
from msflow_ext.models.msflow import MSFlow
from msflow_ext.models.msflow_head import ConditionalFlow
from msflow_ext.models.positional_encoding import positional_encoding

Layout = Callable[[Tensor], Tensor]
Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "max": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "identity": lambda x: x,
}
MODELS = ("model_a", "model_b", "model_c")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def build(golden: Golden, name: str, dtype: torch.dtype, layout: Layout) -> MSFlowHead:
    tensors, meta = golden(name)
    head = head_from_state_dict(under("sd.", tensors), clamp=meta["clamp_alpha"]).to(dtype)
    last = layout(torch.zeros(2, 2, 2, 2)).is_contiguous(memory_format=torch.channels_last)
    return head.to(memory_format=torch.channels_last) if last else head


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the file holds under a prefix, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In units of the largest number of each tensor: 1e-10 in float64, 1e-5 in float32 and 3e-5 of log-dets."""
    assert set(got) == set(expected)
    errors = {}
    for key, want in expected.items():
        bound = 1e-10 if dtype is torch.float64 else 3e-5 if "jac" in key else 1e-5
        assert got[key].shape == want.shape, key
        error = float((got[key].detach() - want).abs().max() / want.abs().max())
        if not error <= bound:
            errors[key] = error
    assert not errors


def run(head: MSFlowHead, h: list[Tensor], pool: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All that the files record of a forward pass, by their names."""
    found: dict[str, Tensor] = {}

    def keep_log_det(key: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({key: output[2]})

    def keep_all(key: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update(named(key, output))

    hooks = [
        step.register_forward_hook(keep_log_det(f"block{s}_{b}.jac"))
        for s, flow in enumerate(head.flows)
        for b, step in enumerate(flow.steps)  # type: ignore[arg-type]
    ]
    hooks += [
        getattr(head.fusion, f"subnet_{i}").register_forward_hook(keep_all(f"st{i}_"))
        for i in (1, 2)
    ]
    y = [pool(t) for t in h]
    out = head(y)
    for hook in hooks:
        hook.remove()
    square_norm = sum(ops.half_square_norm(z) for z in out.z)
    assert isinstance(square_norm, Tensor)
    parallel = [flow(t) for flow, t in zip(head.flows, y, strict=True)]
    halves = [
        u[:, perm].tensor_split(2, 1)
        for (u, _, _), perm in zip(parallel, head.fusion.perms(), strict=True)
    ]
    return {
        **found,
        **named("y", y),
        **named("u", [u for u, _, _ in parallel]),
        **named("jac_parallel", [log_det for _, _, log_det in parallel]),
        "jac_fusion": head.fusion.couple(halves)[1],
        "jac_total": out.log_det,
        **named("z", out.z),
        **named("logp", head.log_likelihood(y)),
        "loss_per_image": square_norm - out.log_det,
        "loss": head.loss(y)[None],
    }


def named(key: str, tensors: Any) -> dict[str, Tensor]:
    return {f"{key}{i}": t for i, t in enumerate(tensors)}


@pytest.mark.parametrize("name", MODELS)
def test_every_recorded_tensor_of_the_forward_pass_is_reproduced(
    each_backend: str, golden: Golden, name: str, dtype: torch.dtype, memory_format: Layout
) -> None:
    tensors, meta = golden(name)
    head = build(golden, name, dtype, memory_format)
    h = [memory_format(t.to(dtype)) for t in under("h", tensors).values()]
    got = run(head, h, POOLS[meta["pool"]])
    assert_equal(got, under("f64.", tensors), dtype)
    if dtype is torch.float32:
        expected = under("f32.", tensors)
        assert_equal({key: got[key] for key in expected}, expected, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_every_recorded_gradient_is_reproduced(
    each_backend: str, golden: Golden, name: str, dtype: torch.dtype, memory_format: Layout
) -> None:
    tensors, meta = golden(name)
    head = build(golden, name, dtype, memory_format)
    h = [memory_format(t.to(dtype)).requires_grad_() for t in under("h", tensors).values()]
    head.loss([POOLS[meta["pool"]](t) for t in h]).backward()
    assert_equal(named("", [t.grad for t in h]), under("grad_h", tensors), dtype)
    ours = {key: p.grad for key, p in head.named_parameters() if p.grad is not None}
    assert_equal(to_reference_names(ours, head), under("grad.", tensors), dtype)


@pytest.mark.parametrize("name", MODELS)
def test_every_recorded_inverse_is_reproduced(
    each_backend: str, golden: Golden, name: str, dtype: torch.dtype, memory_format: Layout
) -> None:
    tensors, meta = golden(name)
    head = build(golden, name, dtype, memory_format)
    scales = range(len(meta["channels"]))
    z, u, y = ([memory_format(tensors[f"f64.{key}{s}"].to(dtype)) for s in scales] for key in "zuy")
    undone, log_det_fusion = head.fusion.inverse(z)
    parallel = [flow.inverse(t) for flow, t in zip(head.flows, u, strict=True)]  # type: ignore[operator]
    assert_equal(named("u", undone), named("u", u), dtype)
    assert_equal(named("y", [t for t, _ in parallel]), named("y", y), dtype)
    got = named("jac_parallel", [log_det for _, log_det in parallel])
    # The published inverse of the fusion flow gives its log-det the sign of the forward pass.
    assert_equal(got | {"jac_fusion_official": -log_det_fusion}, under("rev.", tensors), dtype)
    whole = head.inverse(z)
    assert_equal(named("y", whole.z), named("y", y), dtype)
    assert_equal({"jac_total": -whole.log_det}, {"jac_total": tensors["f64.jac_total"]}, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_the_inference_form_reproduces_the_recorded_latents(
    each_backend: str, golden: Golden, name: str, dtype: torch.dtype, memory_format: Layout
) -> None:
    tensors, _ = golden(name)
    head = build(golden, name, dtype, memory_format).optimize()
    recorded = under("f64.", tensors)
    y = [memory_format(t.to(dtype)) for t in under("y", recorded).values()]
    out = head(y)
    got = {**named("z", out.z), **named("logp", head.log_likelihood(y)), "jac_total": out.log_det}
    assert_equal(got, {key: recorded[key] for key in got}, dtype)


@pytest.mark.parametrize("name", [*MODELS, "parallel_odd"])
def test_positional_encodings_are_the_recorded_bits(golden: Golden, name: str) -> None:
    encodings = under("pe", golden(name)[0])
    assert encodings
    for expected in encodings.values():
        assert torch.equal(positional_encoding(*expected.shape)[0], expected)


def conditional_flow(
    state: dict[str, Tensor], channels: int, blocks: int, cond_channels: int
) -> ConditionalFlow:
    """A parallel flow alone with reference weights; :class:`MSFlowHead` refuses odd channels."""
    flow = ConditionalFlow(channels, blocks, cond_channels, clamp=1.9, clamp_form="0.2")
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        block, name = key.removeprefix("module_list.").split(".", 1)
        conditioning = channels - channels // 2
        for whole, parts in checkpoint_names(name, value, conditioning).items():
            ours[f"steps.{block}.{whole}"] = parts
    flow.load_state_dict(ours)
    return flow


def checkpoint_names(name: str, value: Tensor, conditioning: int) -> dict[str, Tensor]:
    """Our names and shapes of one reference tensor of a block."""
    if name == "w_perm":
        return {"perm": value[:, :, 0, 0].argmax(1)}
    if name == "w_perm_inv":
        return {}
    if name == "subnet.conv1.weight":
        parts = value.tensor_split([conditioning], 1)
        return dict(zip(("subnet.conv_x.weight", "subnet.conv_cond.weight"), parts, strict=True))
    renamed = {"conv1": "conv_cond", "conv2": "conv_out", "ln": "norm"}
    words = [renamed.get(word, word) for word in name.split(".")]
    return {".".join(words): value.flatten() if words[0].startswith("global") else value}


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_flows_with_odd_channels_reproduce_everything_recorded(
    each_backend: str, golden: Golden, scale: int, dtype: torch.dtype, memory_format: Layout
) -> None:
    tensors, meta = golden("parallel_odd")
    prefix = f"parallel_flows.{scale}."
    sizes = (meta[key][scale] for key in ("channels", "blocks", "c_conds"))
    flow = conditional_flow(under(f"sd.{prefix}", tensors), *sizes).to(dtype)
    x = memory_format(tensors[f"x{scale}"].to(dtype)).requires_grad_()
    u, _, log_det = flow(x)
    loss = (ops.half_square_norm(u) - log_det).mean()
    loss.backward()
    got = {"u": u, "jac": log_det, "loss": loss[None]}
    expected = {key: tensors[f"f64.{key}{scale}"] for key in got}
    assert_equal(got, expected, dtype)
    assert x.grad is not None
    assert_equal({"x": x.grad}, {"x": tensors[f"grad_x{scale}"]}, dtype)
    gradients: dict[str, Tensor] = {}
    for key, value in under(f"grad.{prefix}", tensors).items():
        block, name = key.removeprefix("module_list.").split(".", 1)
        parts = checkpoint_names(name, value, flow.channels - flow.channels // 2)
        gradients |= {f"steps.{block}.{name}": part for name, part in parts.items()}
    found = {key: p.grad for key, p in flow.named_parameters() if p.grad is not None}
    assert_equal(found, gradients, dtype)
    assert_equal({"x": flow.inverse(u)[0]}, {"x": x.detach()}, dtype)


class Recorded(nn.Module):
    """A backbone that saw one batch."""

    is_flat = False

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


def test_the_model_pools_features_as_recorded(golden: Golden) -> None:
    tensors, _ = golden("model_a")
    model = MSFlow("test_resnet", pretrained=False, blocks=(1, 1, 1), standardize=False)
    model.backbone = Recorded(list(under("h", tensors).values()))  # type: ignore[assignment]
    got = model.features(torch.zeros(2, 3, 8, 8))
    assert_equal(named("y", got), named("y", under("f64.y", tensors).values()), torch.float32)
