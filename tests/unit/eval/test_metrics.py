"""Metrics against their definitions."""

from __future__ import annotations

import numpy as np

from sanawm_jax.eval.metrics import by_quarter, detail, psnr, ssim
from sanawm_jax.eval.runner import nearest_action


def test_psnr_of_a_known_error(rng: np.random.Generator) -> None:
    a = rng.uniform(0.2, 0.8, (3, 20, 24, 3))
    np.testing.assert_allclose(psnr(a, a + 0.1), 20.0, atol=1e-9)
    assert (psnr(a, a) == 100).all()


def test_ssim(rng: np.random.Generator) -> None:
    a = rng.uniform(0, 1, (2, 32, 32, 3))
    np.testing.assert_allclose(ssim(a, a), 1.0)
    noisy = [ssim(a, np.clip(a + s * rng.normal(size=a.shape), 0, 1)).mean() for s in (0.05, 0.3)]
    assert 1 > noisy[0] > 0.9 > noisy[1] > 0.2
    # of constants only the luminance term is left
    x, y = np.full((1, 16, 16, 3), 0.2), np.full((1, 16, 16, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-6)


def test_detail(rng: np.random.Generator) -> None:
    a = np.tile(np.array([0.0, 0.5]), 8).reshape(1, 1, 16, 1).repeat(3, -1)  # differences of 0.5
    np.testing.assert_allclose(detail(0.5 * a + 0.1, a), [0.5])
    assert detail(a + 0.5 * rng.normal(size=a.shape), a)[0] > 1


def test_quarters() -> None:
    np.testing.assert_array_equal(by_quarter(np.arange(8.0)), [0.5, 2.5, 4.5, 6.5])


def test_nearest_action(rng: np.random.Generator) -> None:
    truths = {k: rng.integers(0, 255, (2, 4, 4, 3), dtype=np.uint8) for k in "wsad"}
    assert nearest_action(truths["a"].astype(np.float32) / 255 * 0.9, truths) == "a"
