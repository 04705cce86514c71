"""Metrics against their definitions."""

from __future__ import annotations

import numpy as np

from sanawm_jax.eval.metrics import by_quarter, gradient_energy, gradient_ratio, psnr, ssim
from sanawm_jax.eval.scenes import nearest_action


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


def test_ssim_with_the_window_of_the_benchmark(rng: np.random.Generator) -> None:
    """Against sums over explicit windows of the mirrored picture, as bytes of 0 to 255."""
    a = rng.integers(0, 256, (1, 14, 16, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    x, y = (np.pad(v[0].astype(float), ((5, 5), (5, 5), (0, 0)), mode="symmetric") for v in (a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for row, column, channel in np.ndindex(14, 16, 3):
        p, q = (v[row : row + 11, column : column + 11, channel] for v in (x, y))
        joint = ((p - p.mean()) * (q - q.mean())).mean()
        score = (2 * p.mean() * q.mean() + c1) * (2 * joint + c2)
        scores.append(score / (p.mean() ** 2 + q.mean() ** 2 + c1) / (p.var() + q.var() + c2))
    np.testing.assert_allclose(ssim(a, b, uniform=True), [np.mean(scores)], rtol=1e-9)
    assert ssim(a, a, uniform=True) == 1


def test_gradient_ratio(rng: np.random.Generator) -> None:
    a = np.tile(np.array([0.0, 0.5]), 8).reshape(1, 1, 16, 1).repeat(3, -1).repeat(4, 1)
    np.testing.assert_allclose(gradient_energy(a), [0.25])  # none from row to row
    np.testing.assert_allclose(gradient_energy(a.swapaxes(1, 2)), [0.25])
    np.testing.assert_allclose(gradient_ratio(0.5 * a + 0.1, a), [0.25])
    assert gradient_ratio(a + 0.5 * rng.normal(size=a.shape), a)[0] > 1


def test_psnr_of_masked_pixels(rng: np.random.Generator) -> None:
    a = rng.uniform(0.2, 0.8, (3, 20, 24, 3))
    b, mask = a.copy(), np.zeros((3, 20, 24), bool)
    mask[:2, 4:, :] = True
    b[:, :4] += 0.2
    b[1] += 0.1
    found = psnr(a, b, mask)
    np.testing.assert_allclose(found[:2], [100, 20], atol=1e-9)
    assert np.isnan(found[2])
    np.testing.assert_array_equal(
        by_quarter(np.array([1.0, np.nan] * 3 + [np.nan] * 2))[-1], np.nan
    )
    np.testing.assert_array_equal(by_quarter(np.array([1.0, np.nan] * 4)), np.ones(4))


def test_bytes_and_floats_give_the_same(rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    for metric in (psnr, ssim, gradient_ratio):
        np.testing.assert_allclose(metric(a, b), metric(a / 255, b / 255), rtol=1e-12)


def test_quarters() -> None:
    np.testing.assert_array_equal(by_quarter(np.arange(8.0)), [0.5, 2.5, 4.5, 6.5])


def test_nearest_action(rng: np.random.Generator) -> None:
    truths = {k: rng.integers(0, 255, (2, 4, 4, 3), dtype=np.uint8) for k in "wsad"}
    assert nearest_action(truths["a"].astype(np.float32) / 255 * 0.9, truths) == "a"
