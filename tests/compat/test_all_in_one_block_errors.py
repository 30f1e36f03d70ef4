"""The block names arguments, inputs and state dicts that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from msflow_ext.compat.freia import AllInOneBlock

FORMS = pytest.mark.parametrize("form", ["0.2", "head"])


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Conv2d(channels_in, channels_out, 1)


def build(channels: int = 6, cond: tuple[int, ...] = (), **options: Any) -> AllInOneBlock:
    dims_c = [(c, 4, 3) for c in cond]
    return AllInOneBlock([(channels, 4, 3)], dims_c, subnet_constructor=subnet, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims_in": []}, r"dims_in must hold one shape .* got \[\]"),
        ({"dims_in": [(4, 2, 2), (4, 2, 2)]}, "dims_in must hold one shape"),
        ({"dims_in": [(4, 2, 2, 2, 2)]}, "dims_in must hold one shape .* at most four sizes"),
        ({"dims_c": [(3, 2, 2), (3, 2, 1)]}, r"dims_c must have the sizes of dims_in"),
        ({"subnet_constructor": None}, "subnet_constructor must be given"),
        ({"affine_clamping": 0.0}, "affine_clamping must be positive, got 0.0"),
        ({"global_affine_type": "RELU"}, "global_affine_type must be one of .* got 'RELU'"),
        ({"global_affine_init": 0.0}, "global_affine_init must be in .* for SOFTPLUS, got 0.0"),
        (
            {"global_affine_init": 10.0, "global_affine_type": "SIGMOID"},
            r"global_affine_init must be in \(0, 10\) for SIGMOID",
        ),
        ({"learned_householder_permutation": -1}, "learned_householder_permutation .* got -1"),
        ({"clamp_form": "atan"}, "clamp_form must be '0.2' or 'head', got 'atan'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AllInOneBlock(**{"dims_in": [(4, 2, 2)], "subnet_constructor": subnet, **arguments})


@pytest.mark.parametrize(
    ("x", "c", "message"),
    [
        (torch.ones(1, 6, 4, 3), [torch.ones(1, 2, 4, 3)], "x must be a list .* got a Tensor"),
        ([], [torch.ones(1, 2, 4, 3)], r"x must be a list or tuple of one tensor, got \[\]"),
        ([torch.ones(1, 5, 4, 3)], [torch.ones(1, 2, 4, 3)], r"x must hold .* got \(1, 5, 4, 3\)"),
        ([torch.ones(1, 6, 4)], [torch.ones(1, 2, 4, 3)], r"x must hold .* got \(1, 6, 4\)"),
        ([torch.ones(1, 6, 4, 3)], [], r"c must be .* 2 channels in all, got \[\]"),
        ([torch.ones(1, 6, 4, 3)], torch.ones(1, 2, 4, 3), "c must be .* got a Tensor"),
    ],
)
def test_a_wrong_input_is_named(x, c, message):
    with pytest.raises(ValueError, match=message):
        build(6, (2,))(x, c)


@FORMS
@pytest.mark.parametrize("key", ["w_perm", "w_perm_inv"])
def test_a_state_dict_whose_permutations_are_not_inverse_is_refused(key, form):
    state = build(clamp_form=form).state_dict()
    state[key] = state[key].roll(1, 0)
    with pytest.raises(RuntimeError, match="w_perm and w_perm_inv must be inverse permutations"):
        build(clamp_form=form).load_state_dict(state)


def test_an_index_that_repeats_a_channel_is_refused():
    state = build(clamp_form="head").state_dict()
    for key in ("w_perm", "w_perm_inv"):
        state[key] = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="must be inverse permutations"):
        build(clamp_form="head").load_state_dict(state)


def test_missing_unknown_and_misshapen_keys_are_named():
    state = build().state_dict()
    state["w_perm"] = build(8).state_dict()["w_perm"]
    state["extra"] = state.pop("global_scale")
    with pytest.raises(RuntimeError, match=r"(?s)global_scale.*extra.*w_perm"):
        build().load_state_dict(state)
