"""Number formats of published safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, published_fields, read_config
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.checkpoints.writer import write_file
from sanawm_jax.core.params import from_leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.vae.config import VAEConfig

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


@pytest.mark.parametrize(
    "name",
    ["w.weight_scale", "w.scale_weight", "w.scale_input", "w.weight_scale_inv", "scaled_fp8"],
)
def test_fp8_with_scales_is_refused(name: str, tmp_path: Path) -> None:
    values = {"w.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn), name: np.ones((), np.float32)}
    shapes = {key: (value.shape, value.dtype) for key, value in values.items()}
    write_file(tmp_path / "w.safetensors", shapes, values.__getitem__)
    with pytest.raises(InputError, match=f"1 tensors of scales such as {name}, which are not"):
        SafetensorsFolder(tmp_path)
    values["w.weight"] = np.ones((2, 2), np.float32)  # a layer may well be called scale
    shapes = {key: (value.shape, value.dtype) for key, value in values.items()}
    write_file(tmp_path / "w.safetensors", shapes, values.__getitem__)
    assert len(list(SafetensorsFolder(tmp_path).keys())) == 2


def test_companions_of_macos_are_no_weights(tmp_path: Path) -> None:
    ones = np.ones(2, np.float32)
    write_file(tmp_path / "w.safetensors", {"w": (ones.shape, ones.dtype)}, lambda key: ones)
    for name in ("._w.safetensors", "._w.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7" + bytes(80))
    assert list(SafetensorsFolder(tmp_path).keys()) == ["w"]


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a"',
        "[]",
        "null",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../w.safetensors"}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "' + 300 * "x" + '"}}',
        '{"weight_map": {"a": "w.safetensors", "b": {}}}',
        "[" * 9999,
        "\0" * 100,
    ],
)
def test_a_damaged_index_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"a"', "[]", "null", '"a"', "\0" * 9, "[" * 9999])
def test_a_damaged_config_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


PUBLISHED = [
    (DiTConfig.from_json, published_fields(TINY.dit)),
    (VAEConfig.from_json, published_fields(TINY.vae)),
    (GemmaConfig.from_json, GemmaConfig().to_json()),
]


@pytest.mark.parametrize("value", [None, "20", -1, 0, 0.5, 1e300, 10**12, [], {}, True, [None], 2])
@pytest.mark.parametrize(("read", "raw"), PUBLISHED)
def test_a_wrong_value_in_a_config_is_one_line(read, raw: dict, value: object) -> None:
    raw = json.loads(json.dumps(raw))
    assert read(raw)
    for name in raw:
        try:
            read({**raw, name: value})
        except InputError as error:
            assert "\n" not in str(error)
