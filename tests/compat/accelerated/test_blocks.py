"""Every accelerated module gives the outputs, log-determinants, inverses and gradients of the original."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import msflow_ext as mx
from msflow_ext import ops
from msflow_ext.ops import _backend

GOLDEN = Path(__file__).parents[2] / "golden"
FORMS = pytest.mark.parametrize("form", ["0.2", "head"])
DIRECTIONS = pytest.mark.parametrize("rev", [False, True], ids=["fwd", "rev"])
NATIVE = pytest.mark.skipif(_backend.C is None, reason="the kernels are not compiled")
OPTIONS = [
    pytest.param(
        {"global_affine_type": kind, "permute_soft": soft, "reverse_permutation": reverse},
        i,
        id=f"{kind}-{'soft' if soft else 'hard'}{'-reverse' * reverse}",
    )
    for i, (kind, soft, reverse) in enumerate(
        itertools.product(("SOFTPLUS", "SIGMOID", "EXP"), (False, True), (False, True))
    )
]


@FORMS
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("native", torch.float64, marks=NATIVE),
        pytest.param("native", torch.float32, marks=NATIVE),
        ("reference", torch.float64),
    ],
)
@pytest.mark.parametrize(("options", "i"), OPTIONS)
def test_a_block_gives_the_results_of_the_original_with_any_option(
    make, options, i, form, backend, dtype
):
    rank, channels = (2, 0, 1, 3)[(i + i // 4) % 4], (8, 7)[i % 2]
    cond = ((), (3,), (2, 1))[i % 3]
    block = make.block(form, channels, rank, cond, affine_clamping=1.5, **options).to(dtype)
    inputs = [t.to(dtype) for t in make.data(channels, rank, cond)]
    expected = [make.results(block, inputs, rev) for rev in (False, True)]
    assert mx.accelerate(block).replaced == [""]
    with ops.backend(backend):
        got = [make.results(block, inputs, rev) for rev in (False, True)]
    for each, want in zip(got, expected, strict=True):
        make.same(each, want, 1e-10 if dtype is torch.float64 else 1e-5)


MASTER = json.loads((GOLDEN / "aio_block_head.json").read_text())["cases"]


@DIRECTIONS
@pytest.mark.parametrize(
    "case",
    [c for c in MASTER if not (c.get("gin") or c.get("hh") or c.get("subnet"))],
    ids=lambda case: str(case["index"]),
)
def test_a_block_of_freias_master_gives_the_recorded_results(make, case, rev):
    file = load_file(GOLDEN / "aio_block_head.safetensors")
    prefix = f"c{case['index']}."
    t = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
    state = {k[3:]: v for k, v in t.items() if k.startswith("sd.")}
    names = {"clamp": "affine_clamping", "type": "global_affine_type", "soft": "permute_soft"}
    names |= {"revperm": "reverse_permutation", "init": "global_affine_init"}
    dims = [(c, *case["spatial"]) for c in (case["channels"], *case.get("cond", []))]
    block = make.classes["head"](
        dims[:1],
        dims[1:],
        make.hidden(case["rank"], len(state["subnet.0.weight"])),
        **{name: case[key] for key, name in names.items() if key in case},
    ).double()
    block.load_state_dict(state)
    cond = [t[f"cond{i}"].double() for i in range(len(dims) - 1)]
    direction = "rev" if rev else "fwd"
    for accelerated in (False, True):
        if accelerated:
            mx.accelerate(block)
        (y,), log_det = block([t[f"{direction}.x"].double()], cond, rev=rev)
        torch.testing.assert_close(y, t[f"{direction}.y"].double(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(log_det, t[f"{direction}.jac"].double(), rtol=1e-10, atol=1e-10)


@DIRECTIONS
@pytest.mark.parametrize("channels", [6, 7])
@pytest.mark.parametrize("cond", [0, 2])
@FORMS
def test_a_chain_gives_the_results_of_the_original(make, form, cond, channels, rev):
    chain = make.chain(form, 3, channels, cond)
    inputs = make.data(channels, cond=(cond,) if cond else ())
    expected = make.results(chain, inputs, rev)
    assert mx.accelerate(chain).fused == {"": "a chain without cat and split between the blocks"}
    make.same(make.results(chain, inputs, rev), expected)


def test_a_chain_is_not_cut_between_its_blocks(make):
    chain = make.chain(blocks=3)
    mx.accelerate(chain)
    (x,) = make.data()
    y, _ = chain(x.requires_grad_())
    nodes, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [n for n, _ in node.next_functions]
    cuts = [n.name() for n in nodes if n.name().startswith(("Cat", "Split", "Slice", "Index"))]
    assert cuts == ["SplitWithSizesBackward0"]  # of x


def test_a_chain_with_several_conditions_and_tuple_output_gives_the_results_of_the_original(
    freia, make
):
    chain = freia.framework.SequenceINN(5, 4, 3, force_tuple_output=True)
    for cond in (1, None, 0):
        given = {} if cond is None else {"cond": cond, "cond_shape": (cond + 1, 4, 3)}
        chain.append(make.classes["0.2"], subnet_constructor=make.hidden(2), **given)
    chain.double()
    x, *c = make.data(5, cond=(1, 2))
    for rev in (False, True):
        (expected,), log_det = chain(x, c, rev=rev)
        mx.accelerate(chain)
        (y,), got = chain((x,), c, rev=rev)
        mx.restore(chain)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got, log_det, rtol=1e-10, atol=1e-10)


def test_a_chain_with_other_modules_between_its_blocks_is_accelerated_block_by_block(freia, make):
    chain = make.chain(blocks=2)
    chain.append(freia.modules.PermuteRandom, seed=0)
    chain.append(make.classes["0.2"], subnet_constructor=make.hidden(2))
    chain.double()
    inputs = make.data()
    expected = make.results(chain, inputs)
    report = mx.accelerate(chain)
    assert report.replaced == ["module_list.0", "module_list.1", "module_list.3"]
    assert not report.fused
    make.same(make.results(chain, inputs), expected)


class ConvNormConv(nn.Module):
    """MSFlow's published subnet, with its names, where another module may replace the ReLU."""

    def __init__(self, channels_in: int, channels_out: int, between: Any = F.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, padding=1)
        self.ln = nn.LayerNorm(channels_in)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.between(self.ln(self.conv1(x).movedim(1, -1)).movedim(-1, 1)))


def test_a_norm_between_convolutions_is_fused_and_gives_the_same_results(make):
    block = make.block(cond=(2,), subnet_constructor=ConvNormConv)
    inputs = make.data(cond=(2,))
    expected = make.results(block, inputs)
    assert mx.accelerate(block).fused == {"subnet": "LayerNorm and ReLU in one pass"}
    make.same(make.results(block, inputs), expected)


@pytest.mark.parametrize("between", [F.gelu, nn.Sequential(nn.ReLU(), nn.Dropout())])
def test_a_subnet_with_another_activation_keeps_its_forward(make, between):
    block = make.block(subnet_constructor=lambda i, o: ConvNormConv(i, o, between)).eval()
    numbers = torch.get_rng_state()
    report = mx.accelerate(block)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert report.replaced == [""] and not report.fused
    assert "its results deviate" in report.kept["subnet"]
    assert type(block.subnet) is ConvNormConv


@pytest.mark.parametrize("shared", [True, False])
def test_a_condition_that_all_images_share_is_convolved_once(make, shared):
    chain = make.chain(blocks=2, cond=4, subnet_constructor=ConvNormConv)
    x, c = make.data(cond=(4,), batch=9)  # 108 positions: enough to split the weight
    inputs = [x, c[:1].repeat(9, 1, 1, 1) if shared else c]
    expected = make.results(chain, inputs)
    mx.accelerate(chain)
    seen = []
    for block in chain:
        conv = block.subnet.conv1
        run = conv._conv_forward
        conv._conv_forward = lambda x, *rest, run=run: seen.append(x.shape[:2]) or run(x, *rest)
    y, _ = chain(inputs[0], inputs[1:])
    assert seen == ([(9, 3), (1, 4)] if shared else [(9, 7)]) * 2
    make.same({"y": y.detach()}, {"y": expected["y"]})
    got = make.results(chain, inputs)
    make.same(got, expected)


def test_a_block_accepts_and_refuses_other_sizes_as_the_original(make):
    x = [torch.randn(2, 6, 9, 8, dtype=torch.float64)]
    free, strict = make.block("0.2"), make.block("head")
    expected, _ = free(x)
    mx.accelerate(free)
    mx.accelerate(strict)
    torch.testing.assert_close(free(x)[0], expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"expected \(6, 4, 3\), got \(6, 9, 8\)"):
        strict(x)


def test_a_hard_permutation_moves_channels_without_mixing_them(make):
    block = make.block()
    mx.accelerate(block)
    (x,) = make.data()
    x[:, 5] = torch.inf  # a matrix product would spread it as NaN
    (y,), _ = block([x])
    assert y.isinf().flatten(2).all(2).sum() == 3
    assert y.isfinite().flatten(2).all(2).sum() == 15


def copied_by_data(block: Any, other: Any) -> None:
    for p, q in zip(block.parameters(), other.parameters(), strict=True):
        p.data.copy_(q.data)


def loaded(block: Any, other: Any) -> None:
    block.load_state_dict(other.state_dict())


def assigned(block: Any, other: Any) -> None:
    block.load_state_dict(other.state_dict(), assign=True)


def swapped(block: Any, other: Any) -> None:
    for name, p in other._parameters.items():
        setattr(block, name, p)
    block.subnet = other.subnet


@FORMS
@pytest.mark.parametrize("way", [loaded, assigned, copied_by_data, swapped])
@pytest.mark.parametrize("chained", [False, True], ids=["block", "chain"])
def test_a_new_permutation_is_used_however_it_is_set(make, way, form, chained):
    blocks, others = ((make.chain(form, 2) if chained else make.block(form)) for _ in range(2))
    inputs = make.data()
    expected = make.results(others, inputs)
    mx.accelerate(blocks)
    make.results(blocks, inputs)
    pairs = zip(blocks, others, strict=True) if chained else [(blocks, others)]
    for block, other in pairs:
        way(block, copy.deepcopy(other))
    make.same(make.results(blocks, inputs), expected)


@pytest.mark.parametrize("way", [loaded, copied_by_data])
def test_a_rotation_replaces_a_permutation_and_back(make, way):
    block, inputs = make.block(), make.data()
    mx.accelerate(block)
    for soft in (True, False):
        other = make.block(permute_soft=soft)
        way(block, other)
        for rev in (False, True):
            make.same(make.results(block, inputs, rev), make.results(other, inputs, rev))


def test_a_permutation_that_requires_a_gradient_gets_it(make):
    block, inputs = make.block(), make.data()
    block.w_perm.requires_grad_()
    expected = make.results(block, inputs)
    mx.accelerate(block)
    assert expected["grad.w_perm"].abs().max() > 0
    make.same(make.results(block, inputs), expected)
