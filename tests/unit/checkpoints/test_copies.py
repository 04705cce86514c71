import ml_dtypes
import numpy as np
import pytest

from sanawm_jax.checkpoints.copies import copy_into

_SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 3.4e38, -3.4e38, 1e-45, 1.0039062, 1.01]
_NANS_AND_TIES = [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x3F808000, 0x3F818000]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("block", [1 << 18, 7])
def test_rounds_as_numpy(
    axes: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sanawm_jax.checkpoints.copies._BLOCK", block)
    value = np.random.default_rng(0).standard_normal((5, 11, 6), np.float32)
    value[2, :, 3] = _SPECIAL
    value.view(np.uint32)[0, 0] = _NANS_AND_TIES
    value = value.transpose(axes)
    expected = np.empty(value.shape, ml_dtypes.bfloat16)
    expected[...] = value
    found = np.zeros_like(expected)
    copy_into(found, value)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.float32, np.float32),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, np.float32),
        (np.float32, ml_dtypes.bfloat16),
        (np.float16, ml_dtypes.bfloat16),
        (np.int64, np.int64),
        (np.bool_, np.bool_),
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_other_dtypes(source: type, target: type, shape: tuple[int, ...]) -> None:
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(source).T
    found = np.empty(value.shape, target)
    copy_into(found, value)
    np.testing.assert_array_equal(found, value.astype(target))
