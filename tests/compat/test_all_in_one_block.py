"""The block equals that of FrEIA, recorded and installed, with all options, and keeps its permutation."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from msflow_ext import ops
from msflow_ext.bench.reference import Subnet
from msflow_ext.compat.freia import AllInOneBlock, hard_permutation
from msflow_ext.ops import _backend

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"0.2": "aio_block", "head": "aio_block_head"}
TENSORS = {form: load_file(GOLDEN / f"{file}.safetensors") for form, file in FILES.items()}
CASES = [
    pytest.param(form, case, id=f"{form}-{case['index']}")
    for form, file in FILES.items()
    for case in json.loads((GOLDEN / f"{file}.json").read_text())["cases"]
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
DIRECTIONS = pytest.mark.parametrize("rev", [False, True], ids=["fwd", "rev"])
NATIVE = pytest.mark.skipif(_backend.C is None, reason="the kernels are not compiled")
FORMS = pytest.mark.parametrize("form", ["0.2", "head"])


class Hidden:
    """Constructor of a subnet with one hidden layer for data of ``rank`` spatial dimensions."""

    def __init__(self, rank: int, hidden: int) -> None:
        self.rank, self.hidden = rank, hidden

    def __call__(self, channels_in: int, channels_out: int) -> nn.Module:
        if self.rank == 0:
            layers = [nn.Linear(channels_in, self.hidden), nn.Linear(self.hidden, channels_out)]
        else:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.rank - 1]
            layers = [
                conv(channels_in, self.hidden, 3, padding=1),
                conv(self.hidden, channels_out, 3, padding=1),
            ]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def build(channels: int = 6, rank: int = 2, cond: tuple[int, ...] = (), **options: Any):
    options.setdefault("subnet_constructor", Hidden(rank, 8))
    sizes = (4, 3, 2)[:rank]
    return AllInOneBlock([(channels, *sizes)], [(c, *sizes) for c in cond], **options)


def disturbed(block: nn.Module) -> nn.Module:
    """Return ``block`` with random changes of its trained parameters."""
    with torch.no_grad():
        for p in block.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    return block


def index(block: AllInOneBlock) -> Tensor:
    """Return the index that the kernel uses."""
    assert block.perm is not None
    return block.perm


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def results(
    block: nn.Module, rev: bool, x: Tensor, c: list[Tensor], w: Tensor, wj: Tensor
) -> dict[str, Tensor]:
    """Return what the golden files record of a call: results, and gradients of their weighted sum."""
    x, *c = (t.clone().requires_grad_() for t in (x, *c))
    block.zero_grad()
    (y,), jac = block([x], c, rev=rev)
    ((y * w).sum() + (jac * wj).sum()).backward()
    found = {"y": y.detach(), "jac": jac.detach(), "grad_x": x.grad}
    found |= {f"grad_c{i}": t.grad for i, t in enumerate(c)}
    found |= {f"grad.{name}": p.grad for name, p in block.named_parameters()}
    return {key: t for key, t in found.items() if t is not None}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Assert agreement within 1e-10 (float32: 1e-5, log-determinants 3e-5) of each tensor's largest magnitude."""
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        bound = 1e-10 if dtype is torch.float64 else 3e-5 if key == "jac" else 1e-5
        largest = want.double().abs().max().clamp_min(1 if key == "jac" else 0)
        assert got[key].shape == want.shape
        assert got[key].dtype is dtype
        assert (got[key].double() - want.double()).abs().max() <= bound * largest, key


def golden(
    form: Any, case: dict[str, Any]
) -> tuple[AllInOneBlock, dict[str, Tensor], dict[str, Tensor]]:
    """Return block, state dict and tensors of a recorded case."""
    prefix = f"c{case['index']}."
    tensors = {k[len(prefix) :]: t for k, t in TENSORS[form].items() if k.startswith(prefix)}
    state = {k[3:]: t for k, t in tensors.items() if k.startswith("sd.")}
    subnet = Subnet
    if case.get("subnet") != "ln":
        subnet = Hidden(case["rank"], len(state["subnet.0.weight"]))
    block = AllInOneBlock(
        [(case["channels"], *case["spatial"])],
        [(c, *case["spatial"]) for c in case.get("cond", [])],
        subnet,
        case.get("clamp", 2.0),
        case.get("gin", False),
        case.get("init", 1.0),
        case.get("type", "SOFTPLUS"),
        case.get("soft", False),
        case.get("hh", 0),
        case.get("revperm", False),
        clamp_form=form,
    )
    return block, state, tensors


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NATIVE), "reference"])
@DIRECTIONS
@DTYPES
@pytest.mark.parametrize(("form", "case"), CASES)
def test_results_and_gradients_equal_the_recorded_ones(form, case, dtype, rev, backend):
    block, state, tensors = golden(form, case)
    block.to(dtype).load_state_dict(state)
    direction = "rev." if rev else "fwd."
    x, w, wj = (tensors[key].to(dtype) for key in (f"{direction}x", "w", "wj"))
    cond = [tensors[f"cond{i}"].to(dtype) for i in range(len(case.get("cond", [])))]
    with ops.backend(backend):
        got = results(block, rev, x, cond, w, wj)
    expected = {k[4:]: t for k, t in tensors.items() if k.startswith(direction) and k[4:] != "x"}
    assert_equal(got, expected, dtype)


@pytest.mark.parametrize(("form", "case"), CASES)
def test_a_new_block_has_freias_state_dict_and_initial_scale(form, case):
    block, state, _ = golden(form, case)
    own = block.state_dict()
    assert {k: (t.shape, t.dtype) for k, t in own.items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }
    assert own["global_scale"].flatten().tolist() == pytest.approx(
        [case["init_global_scale"]] * case["channels"], rel=1e-6, abs=1e-6
    )
    assert not own["global_offset"].any()
    assert all(t.is_contiguous() for t in own.values())  # safetensors requires it
    assert len({t.data_ptr() for t in own.values()}) == len(own)


OPTIONS = [
    pytest.param(
        {
            "global_affine_type": kind,
            "gin_block": gin,
            "reverse_permutation": reverse,
            "permute_soft": permutation == "soft",
            "learned_householder_permutation": 3 * (permutation == "householder"),
        },
        i,
        id=f"{kind}-{permutation}{'-gin' * gin}{'-reverse' * reverse}",
    )
    for i, (kind, permutation, gin, reverse) in enumerate(
        itertools.product(
            ("SOFTPLUS", "SIGMOID", "EXP"),
            ("hard", "soft", "householder"),
            (False, True),
            (False, True),
        )
    )
]


@DTYPES
@pytest.mark.parametrize(("options", "i"), OPTIONS)
def test_results_and_gradients_equal_those_of_the_installed_freia(freia, options, i, dtype):
    torch.manual_seed(i)
    rank, channels, cond = (2, 0, 1, 3, 2)[i % 5], (8, 7)[i % 2], ((), (3,), (2, 1))[i % 3]
    sizes = (4, 3, 2)[:rank]
    theirs = disturbed(
        freia.modules.AllInOneBlock(
            [(channels, *sizes)],
            [(c, *sizes) for c in cond],
            Hidden(rank, 8),
            affine_clamping=1.5,
            global_affine_init=0.8,
            **options,
        )
    ).to(dtype)
    ours = build(channels, rank, cond, affine_clamping=1.5, global_affine_init=0.8, **options).to(
        dtype
    )
    ours.load_state_dict(theirs.state_dict())
    x, w = (normal(3, channels, *sizes, dtype=dtype) for _ in range(2))
    operands = (x, [normal(3, c, *sizes, dtype=dtype) for c in cond], w, normal(3, dtype=dtype))
    for rev in (False, True):
        assert_equal(results(ours, rev, *operands), results(theirs, rev, *operands), dtype)


def test_a_freia_chain_of_these_blocks_equals_one_of_freias_blocks(freia):
    chains = []
    for module in (freia.modules.AllInOneBlock, AllInOneBlock):
        chain = freia.framework.SequenceINN(6, 4, 3)
        for _ in range(3):
            chain.append(module, cond=0, cond_shape=(2, 4, 3), subnet_constructor=Hidden(2, 8))
        chains.append(chain.double())
    theirs, ours = chains
    disturbed(theirs)
    ours.load_state_dict(theirs.state_dict())
    names = [[name for name, _ in chain.named_parameters()] for chain in chains]
    assert names[0] == names[1]  # so the state of an optimizer fits too
    x, c = normal(2, 6, 4, 3), [normal(2, 2, 4, 3)]
    for rev in (False, True):
        for got, expected in zip(ours(x, c, rev=rev), theirs(x, c, rev=rev), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@FORMS
@pytest.mark.parametrize(("options", "i"), OPTIONS)
def test_rev_undoes_forward_and_log_det_is_that_of_the_jacobian(options, i, form):
    torch.manual_seed(i)
    block = disturbed(build(5, 1, (2,), clamp_form=form, **options).double())
    x, c = normal(1, 5, 4), [normal(1, 2, 4)]
    (y,), log_det = block([x], c)
    (back,), log_det_back = block((y,), c, rev=True)
    rounding = 1e-5 if options["permute_soft"] else 1e-10  # the rotation is float32
    torch.testing.assert_close(back, x, rtol=rounding, atol=rounding)
    torch.testing.assert_close(log_det_back, -log_det, rtol=rounding, atol=rounding)
    jacobian = torch.autograd.functional.jacobian(lambda t: block([t], c)[0][0].flatten(), x)
    expected = torch.linalg.slogdet(jacobian.view(20, 20)).logabsdet
    torch.testing.assert_close(log_det[0], expected, rtol=rounding, atol=rounding)


def test_a_hard_permutation_moves_channels_without_mixing_them():
    block = build(6)
    x = normal(1, 6, 4, 3, dtype=torch.float32)
    x[:, 5] = torch.inf  # a matrix product would spread it as NaN
    (y,), _ = block([x])
    assert y.isinf().flatten(2).all(2).sum() == 1
    assert y.isfinite().flatten(2).all(2).sum() == 5


def test_a_soft_permutation_is_a_rotation():
    w = build(32, permute_soft=True).w_perm.detach().double().flatten(1)
    torch.testing.assert_close(w @ w.T, torch.eye(32).double(), rtol=0, atol=1e-6)
    assert torch.linalg.det(w) == pytest.approx(1, abs=1e-5)
    assert hard_permutation(w) is None


def test_the_seed_of_torch_determines_the_permutation():
    blocks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        blocks.append(build(16))
    perms = [index(block).tolist() for block in blocks]
    assert perms[0] == perms[1] != perms[2]


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("source", ["0.2", "head"])
@FORMS
def test_either_encoding_loads_and_a_block_saves_its_own(form, source, rank):
    saved = build(7, rank, clamp_form=source).double()
    state = saved.state_dict()
    block = build(7, rank, clamp_form=form).double()
    block.load_state_dict(state)
    assert torch.equal(index(block), index(saved))
    again = block.state_dict()
    shape = (7,) if form == "head" else (7, 7, *[1] * rank)
    assert [again[k].shape for k in ("w_perm", "w_perm_inv")] == [shape, shape]
    assert again["w_perm"].dtype is (torch.int64 if form == "head" else torch.float64)
    inverse = hard_permutation(again["w_perm_inv"])
    assert inverse is not None
    assert torch.equal(inverse, torch.argsort(index(block)))
    saved.load_state_dict(again)
    assert torch.equal(index(saved), index(block))
    assert state["w_perm"].shape == ((7,) if source == "head" else (7, 7, *[1] * rank))


def test_a_rotation_loads_into_a_block_with_a_hard_permutation():
    hard, soft = build(), disturbed(build(permute_soft=True))
    x = [normal(2, 6, 4, 3, dtype=torch.float32)]
    hard.load_state_dict(soft.state_dict())
    assert hard.perm is None
    torch.testing.assert_close(hard(x), soft(x), rtol=0, atol=0)


def through_pickle(block: AllInOneBlock) -> AllInOneBlock:
    return pickle.loads(pickle.dumps(block))


def through_a_file(block: AllInOneBlock) -> AllInOneBlock:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_meta_block(block: AllInOneBlock) -> AllInOneBlock:
    with torch.device("meta"):
        empty = build(clamp_form=block.clamp_form)
    empty.load_state_dict(block.state_dict(), assign=True)
    return empty


def through_an_empty_block(block: AllInOneBlock) -> AllInOneBlock:
    with torch.device("meta"):
        empty = build(clamp_form=block.clamp_form)
    empty.to_empty(device="cpu").load_state_dict(block.state_dict())
    return empty


@FORMS
@pytest.mark.parametrize(
    "journey",
    [
        copy.deepcopy,
        through_pickle,
        through_a_file,
        through_a_meta_block,
        through_an_empty_block,
        lambda block: block.double().half().float(),
    ],
    ids=["deepcopy", "pickle", "file", "meta", "empty", "dtypes"],
)
def test_a_copied_block_keeps_its_permutation_and_results(journey, form):
    block = build(clamp_form=form)
    block.load_state_dict(build(clamp_form=form).state_dict())
    block.half().float()  # so that later conversions do not round
    x = [normal(2, 6, 4, 3, dtype=torch.float32)]
    expected, perm = block(x), index(block)
    other = journey(block)
    assert index(other).dtype is torch.int64
    assert torch.equal(index(other), perm)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@DIRECTIONS
@pytest.mark.parametrize("options", [{}, {"gin_block": True}, {"permute_soft": True}], ids=str)
def test_half_precision_works_under_autocast_and_in_a_bfloat16_block(options, rev):
    block = disturbed(build(6, 2, (2,), **options))
    x, c = normal(2, 6, 4, 3, dtype=torch.float32), [normal(2, 2, 4, 3, dtype=torch.float32)]
    (expected,), log_det = block([x], c, rev=rev)
    with torch.autocast("cpu", torch.bfloat16):
        (y,), got = block([x], c, rev=rev)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(got, log_det, rtol=0.1, atol=0.1)
    half = block.bfloat16()
    (y,), got = half([x.bfloat16()], [c[0].bfloat16()], rev=rev)
    assert y.dtype is torch.bfloat16
    assert got.dtype is torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.2, atol=0.2)


@NATIVE
def test_a_fully_convolutional_block_accepts_other_sizes_and_keeps_channels_last():
    block = build(6)
    x = normal(2, 6, 9, 8, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with ops.backend("native"):
        (y,), _ = block([x])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert block.output_dims([(6, 9, 8)]) == [(6, 9, 8)]


def test_a_block_loads_a_part_of_its_state_when_not_strict():
    block = build()
    perm = index(block)
    block.load_state_dict({"global_offset": torch.ones(1, 6, 1, 1)}, strict=False)
    assert block.global_offset.eq(1).all()
    assert torch.equal(index(block), perm)


def test_a_single_channel_is_only_scaled():
    def subnet(channels_in: int, channels_out: int) -> nn.Module:
        assert (channels_in, channels_out) == (1, 0)
        return NoChannels()

    block = build(1, 1, subnet_constructor=subnet, global_affine_init=0.5)
    x = normal(2, 1, 4, dtype=torch.float32)
    (y,), log_det = block([x])
    torch.testing.assert_close(y, 0.5 * x)
    torch.testing.assert_close(log_det, torch.full((2,), 4 * math.log(0.5)))
    torch.testing.assert_close(block([y], rev=True)[0][0], x)


class NoChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :0]
