"""Windows, drift and the comparison with the truth at some times."""

from __future__ import annotations

import numpy as np
import pytest

from sanawm_jax.eval import drift as module
from sanawm_jax.eval.drift import against_truth, drift, windows


@pytest.fixture
def still(rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.uniform(0.2, 0.8, (1, 12, 12, 3)), 48, 0)


@pytest.fixture(autouse=True)
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_SECONDS", 1.0)


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_SECONDS", 10.0)
    assert windows(961) == [slice(160 * i, 160 * (i + 1)) for i in range(5)] + [slice(800, 961)]
    assert windows(49) == [slice(0, 49)]
    assert windows(240) == [slice(0, 160), slice(160, 240)]  # half a window is one


def test_a_still_video_does_not_drift(still: np.ndarray) -> None:
    found = drift(still)
    assert found["windows"] == 3
    for name in ("gradient", "sharpness", "saturation"):
        np.testing.assert_allclose(found[f"{name}_ratio_by_window"], 1.0)
    assert found["color_distance_worst"] == 0


def test_drift_finds_the_window_that_lost_contrast_and_colour(still: np.ndarray) -> None:
    faded = still.copy()
    faded[16:32] = 0.5 * faded[16:32] + 0.25 * faded[16:32].mean((1, 2), keepdims=True)
    found = drift(faded)
    np.testing.assert_allclose(found["gradient_ratio_by_window"], [1.0, 0.25, 1.0])
    np.testing.assert_allclose(found["sharpness_ratio_by_window"], [1.0, 0.25, 1.0])
    assert found["gradient_ratio_worst"] == pytest.approx(0.25)
    assert found["gradient_ratio_mean"] == pytest.approx(0.625)
    assert found["sharpness_min"] == pytest.approx(found["sharpness_mean"] / 3)
    assert found["color_distance_worst"] > 0.3 and found["color_distance_by_window"][2] == 0
    gray = still.copy()
    gray[32:] = gray[32:].mean(-1, keepdims=True)
    found = drift(gray)
    assert found["saturation_ratio_worst"] == pytest.approx(0, abs=1e-6)
    assert found["saturation_min"] == pytest.approx(0, abs=1e-6)


def test_a_constantly_bad_video_has_a_low_sharpness(still: np.ndarray) -> None:
    """The ratios cannot tell it from a good one, the absolute figures can."""
    good, bad = drift(still), drift(0.1 * still + 0.4)
    assert bad["gradient_ratio_worst"] == pytest.approx(good["gradient_ratio_worst"])
    assert bad["sharpness_min"] < 0.02 * good["sharpness_min"]
    assert bad["saturation_min"] < 0.3 * good["saturation_min"]


def test_saturation_and_histogram_of_known_colours() -> None:
    red = np.zeros((1, 4, 4, 3))
    red[..., 0] = 0.7
    white = np.full((1, 4, 4, 3), 0.9)
    assert module.saturation(red)[0] == 1 and module.saturation(white)[0] == 0
    half = np.concatenate([red[:, :2], white[:, :2]], 1)
    histograms = [module.color_histogram(v) for v in (red, white, half)]
    assert module.histogram_distance(*histograms[:2]) == 1
    assert module.histogram_distance(histograms[0], histograms[2]) == 0.5


def test_against_truth(still: np.ndarray) -> None:
    made = still.copy()
    made[16:] += 0.1
    made[17] += 0.1
    found = against_truth(made, still, times=(0.25, 1.5, 2.0, 60.0))
    assert list(found) == ["0.25s", "1.5s", "2s"]
    assert found["0.25s"]["psnr"] == 100 and found["1.5s"]["psnr"] == pytest.approx(20)
    assert found["2s"]["gradient_ratio"] == pytest.approx(1)
    found = against_truth(made, still, times=(1.0,))["1s"]  # frames 12 to 20
    assert found["psnr_min"] == pytest.approx(-20 * np.log10(0.2))
    assert found["ssim_min"] < found["ssim"] < 1
