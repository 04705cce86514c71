"""Tokenizer folders: padding, truncation, and errors that say what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder."""
    root = tmp_path_factory.mktemp("small")
    make_small_text_encoder(["a red ball"], root, hidden=64, layers=1, chi_prompt=())
    return root / "tokenizer"


def test_padding_and_truncation(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    bos, a, red, ball = tokenizer.encode("a red ball")
    ids, mask = tokenizer(["a red ball", "a", ""], 3)
    np.testing.assert_array_equal(ids, [[bos, a, red], [bos, a, 0], [bos, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    assert ids.dtype == mask.dtype == np.int32
    assert tokenizer.encode("a red ball") == [bos, a, red, ball]  # a call leaves no trace
    assert tokenizer([], 3)[0].shape == (0, 3)


def test_special_tokens_need_room(folder: Path) -> None:
    with pytest.raises(InputError, match="use 2 or more"):
        Tokenizer(folder)(["a"], 1)


def test_works_without_a_configuration(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert Tokenizer(tmp_path).pad_id == 0


@pytest.mark.parametrize("content", [None, b"", b'{"version": "1.0", "mod', b"\xff\xfe", b"[1]"])
def test_missing_or_corrupt_file(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    said = "does not exist" if content is None else "not a tokenizer file"
    with pytest.raises(InputError, match=said) as caught:
        Tokenizer(tmp_path)
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_configuration(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<nothing>"}')
    with pytest.raises(InputError, match="<nothing>"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Tokenizer(tmp_path)
