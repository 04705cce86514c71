import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.vae.blocks import _pad


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", None])
@pytest.mark.parametrize("time", [(2, 0), (1, 1), (0, 0)])
@pytest.mark.parametrize("size", [(3, 4, 5), (1, 2, 2), (2, 1, 1)])
def test_gradient_is_the_transpose(
    mode: str | None, time: tuple[int, int], size: tuple[int, int, int]
) -> None:
    """Padding equals NumPy's, and its gradient is its adjoint: <d, pad(x)> = <grad, x>."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3))
    with jax.enable_x64():
        y, vjp = jax.vjp(lambda x: _pad(x, time, mode), jnp.asarray(x))
        d = rng.standard_normal(y.shape)
        (dx,) = vjp(jnp.asarray(d))
        np.testing.assert_allclose(np.vdot(d, y), np.vdot(dx, x), rtol=1e-12)
        assert dx.dtype == y.dtype == np.float64
    width = 1 if mode else 0
    expected = np.pad(x, [(0, 0), time, (0, 0), (0, 0), (0, 0)], mode="edge")
    names = {"reflect": "reflect", "replicate": "edge", "circular": "wrap", None: "edge"}
    expected = np.pad(
        expected, [(0, 0), (0, 0), (width, width), (width, width), (0, 0)], names[mode]
    )
    np.testing.assert_array_equal(y, expected)
