"""Optimized models are independent of the original and of the batch, and can be copied, pickled and loaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from msflow_ext import FastFlow, MSFlow

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.family("optimized models")]

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(kind: str, seed: int = 1) -> MSFlow | FastFlow:
    options = {"image_size": 64, "pretrained": False, "standardize": True, "anomaly_map": "clamped"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "fastflow":
            return FastFlow("test_efficientnet", steps=2, seed=seed, **options).eval()
        blocks = {"blocks": (1, 1, 1), "cond_channels": 8}
        return MSFlow("test_efficientnet", seed=seed, **blocks, **options).eval()


@pytest.fixture(scope="module", params=["msflow", "fastflow"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def scores(model: torch.nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        return model(images).score


def test_nothing_is_shared_with_the_original_and_its_later_changes_have_no_effect(
    kind: str,
) -> None:
    model = make(kind)
    form = model.optimize()
    expected, state = scores(form), model.state_dict()
    assert list(form.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in form.state_dict().items())
    own = {t.data_ptr() for t in state.values()}
    assert not own & {t.data_ptr() for t in form.state_dict().values()}
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()
    assert torch.equal(scores(form), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_used_optimized_model_can_be_copied_pickled_and_optimized_again(
    kind: str, dtype: torch.dtype
) -> None:
    form = make(kind).optimize(dtype)
    expected = scores(form)
    copies = copy.deepcopy(form), pickle.loads(pickle.dumps(form)), form.optimize(dtype)
    for each in copies:
        assert torch.equal(scores(each), expected)


def test_loaded_and_changed_weights_are_packed_again(kind: str) -> None:
    form, other = make(kind).optimize(), make(kind, seed=2)
    before, expected = scores(form), scores(other.optimize())
    assert not torch.equal(before, expected)
    form.load_state_dict(other.state_dict())
    assert torch.equal(scores(form), expected)
    with torch.no_grad():
        next(form.head.parameters()).add_(0.1)
    assert not torch.equal(scores(form), expected)


def test_another_dtype_is_refused_by_name(kind: str) -> None:
    form = make(kind).optimize()
    for convert in (form.half, form.double, form.bfloat16):
        with pytest.raises(TypeError, match=r"^dtype must be torch\.float32, .* got torch\."):
            convert()
    expected = scores(form)
    assert torch.equal(scores(form.float().to("cpu")), expected)


def test_images_and_features_that_are_not_finite_are_refused(kind: str) -> None:
    model = make(kind)
    for each in (model, model.optimize()):
        with pytest.raises(ValueError, match=r"images must be RGB in 0\.\.1, got nan"):
            scores(each, torch.full_like(IMAGES, float("nan")))
        features = each.features(IMAGES)
        features[0][0, 0, 0, 0] = float("inf")
        with pytest.raises(ValueError, match="features must be finite, scale 0 has NaN"):
            each.head.log_likelihood(features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_the_first_batch(kind: str, dtype: torch.dtype) -> None:
    model = make(kind)
    one, many = model.optimize(dtype), model.optimize(dtype)
    scores(many, torch.rand(9, 3, 64, 64))
    single = torch.cat([scores(one, image[None]) for image in IMAGES])
    for form in (one, many):
        torch.testing.assert_close(scores(form), single, rtol=1e-6, atol=1e-6)
