"""Number formats of published safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder
from sanawm_jax.checkpoints.writer import write_file
from sanawm_jax.core.params import from_leaves
from sanawm_jax.runtime.errors import InputError

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_read_and_written(name: str, tmp_path: Path) -> None:
    stored = np.array([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]]).astype(getattr(ml_dtypes, name))
    write_file(tmp_path / "w.safetensors", {"w": (stored.shape, stored.dtype)}, lambda key: stored)
    source = SafetensorsFolder(tmp_path)
    assert source.dtype("w") == stored.dtype and source.shape("w") == (2, 3)
    np.testing.assert_array_equal(source.read("w").view(np.uint8), stored.view(np.uint8))
    abstract = from_leaves({"w": jnp.zeros((2, 3))})
    for dtype in (np.float32, jnp.bfloat16):
        params = keymap.load(keymap.table(abstract), abstract, source, what="w", dtype=dtype)
        assert params["w"].dtype == dtype
        np.testing.assert_array_equal(np.asarray(params["w"], np.float32), stored.astype("f4"))


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stored = np.array([0.5, -2.0]).astype(ml_dtypes.float8_e4m3fn)
    write_file(tmp_path / "w.safetensors", {"w": (stored.shape, stored.dtype)}, lambda key: stored)
    tensor = load_file(tmp_path / "w.safetensors")["w"]
    assert str(tensor.dtype) == "torch.float8_e4m3fn" and tensor.float().tolist() == [0.5, -2.0]


def test_four_bits_are_refused(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(InputError, match=r"tensor w is stored as F4, which cannot be read"):
        SafetensorsFolder(tmp_path)
