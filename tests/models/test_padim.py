"""The PaDiM-style baseline equals its definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from msflow_ext.models.padim import Padim

GRID = 4


def feature_maps(images: int, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    """Return correlated Gaussian features of two scales, far from zero; the finest is not the first."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(images, 3, 2, 2, generator=rng, dtype=torch.float64) + 100
    fine = torch.randn(images, 5, GRID, GRID, generator=rng, dtype=torch.float64).cumsum(1) - 50
    return [coarse.to(dtype), fine.to(dtype)]


def in_batches(features: list[torch.Tensor], size: int):
    """Yield batches once, as a loader does."""
    return iter(list(zip(*(x.split(size) for x in features), strict=True)))


def mahalanobis(train: list[torch.Tensor], test: list[torch.Tensor]) -> np.ndarray:
    """Return the distances ``(N, GRID, GRID)`` by numpy, one position at a time."""

    def embedded(features):
        maps = [F.interpolate(x, (GRID, GRID), mode="bilinear") for x in features]
        return torch.cat(maps, 1).double().numpy()

    x, y = embedded(train), embedded(test)
    distances = np.empty((len(y), GRID, GRID))
    for i, j in np.ndindex(GRID, GRID):
        precision = np.linalg.inv(np.cov(x[:, :, i, j].T) + 0.01 * np.eye(x.shape[1]))
        d = y[:, :, i, j] - x[:, :, i, j].mean(0)
        distances[:, i, j] = np.sqrt(np.einsum("na,ab,nb->n", d, precision, d))
    return distances


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 7, 20])
def test_map_and_score_are_the_mahalanobis_distance_for_any_batch_size(dtype, batch):
    train, test = feature_maps(20, dtype=dtype), feature_maps(3, seed=1, dtype=dtype)
    found = Padim().fit(in_batches(train, batch)).predict(test, GRID)
    expected = mahalanobis(train, test)
    rtol = 1e-10 if dtype == torch.float64 else 2e-4
    assert found.anomaly_map.dtype == found.score.dtype == dtype
    np.testing.assert_allclose(found.anomaly_map.numpy(), expected, rtol)
    np.testing.assert_allclose(found.score.numpy(), expected.max((1, 2)), rtol)


def test_the_map_is_upsampled_to_the_requested_size():
    model = Padim().fit([feature_maps(20)])
    small = model.predict(feature_maps(3, seed=1), GRID).anomaly_map
    large = model.predict(feature_maps(3, seed=1), 12)
    expected = F.interpolate(small[:, None], (12, 12), mode="bilinear")[:, 0]
    torch.testing.assert_close(large.anomaly_map, expected)
    torch.testing.assert_close(large.score, expected.amax((1, 2)))


def test_half_precision_features_are_processed_in_float32():
    train, test = feature_maps(20, dtype=torch.bfloat16), feature_maps(3, 1, torch.bfloat16)
    found = Padim().fit([train]).predict(test, GRID)
    float32 = Padim().fit([[x.float() for x in train]]).predict([x.float() for x in test], GRID)
    assert found.score.dtype == torch.float32
    assert found.score.equal(float32.score)


def test_an_outlier_has_the_highest_score_and_is_localized():
    test = feature_maps(6, seed=2)
    test[1][4, :, 1, 3] += 10
    found = Padim().fit([feature_maps(40)]).predict(test, GRID)
    assert found.score.argmax() == 4
    assert found.anomaly_map[4].argmax() == 1 * GRID + 3


def test_fit_refuses_too_few_images():
    with pytest.raises(ValueError, match=r"batches must hold at least two images, got none"):
        Padim().fit([])
    with pytest.raises(ValueError, match=r"batches must hold at least two images, got 1"):
        Padim().fit([feature_maps(1)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    broken = feature_maps(4)
    broken[1][2, 0, 1, 1] = value
    with pytest.raises(ValueError, match=r"features\[1\] must be finite, got NaN or infinity"):
        Padim().fit([feature_maps(4), broken])
    model = Padim().fit([feature_maps(4)])
    with pytest.raises(ValueError, match=r"features\[1\] must be finite, got NaN or infinity"):
        model.predict(broken, GRID)


MALFORMED = {
    "none": ([], ValueError, "features must hold at least one map, got none"),
    "rank": ([torch.zeros(4, 3)], ValueError, r"features\[0\] must be .*, got \(4, 3\)"),
    "empty": ([torch.zeros(4, 3, 0, 2)], ValueError, r"features\[0\] .*, got \(4, 3, 0, 2\)"),
    "counts": (
        [torch.zeros(4, 3, 2, 2), torch.zeros(2, 3, 2, 2)],
        ValueError,
        r"features\[1\] must be .*, got \(2, 3, 2, 2\)",
    ),
    "integers": (
        [torch.zeros(4, 3, 2, 2).int()],
        TypeError,
        r"features\[0\] must be floating point, got torch.int32",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_features_are_refused(case):
    features, error, message = MALFORMED[case]
    with pytest.raises(error, match=f"^{message}$"):
        Padim().fit([features])


def test_shapes_other_than_the_fitted_ones_are_refused():
    other = [feature_maps(4)[1]]
    message = r"features must concatenate to \(C, H, W\) = \(8, 4, 4\), as in the first batch, got \(5, 4, 4\)"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Padim().fit([feature_maps(4), other])
    with pytest.raises(ValueError, match=f"^{message}$"):
        Padim().fit([feature_maps(4)]).predict(other, GRID)


def test_predict_refuses_an_unfitted_model_and_an_empty_map():
    with pytest.raises(RuntimeError, match=r"this Padim is not fitted: call fit first"):
        Padim().predict(feature_maps(2), GRID)
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        Padim().fit([feature_maps(4)]).predict(feature_maps(2), 0)
