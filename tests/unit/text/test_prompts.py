"""The selection of a caption's token states, and prompts on the command line."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.text.prompts import (
    CHI_PROMPT,
    encode_prompt,
    encode_texts,
    note_if_cut,
    read_prompt,
)
from sanawm_jax.text.tokenizer import Tokenizer

CAPTION = "A small red house on a hill."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Returns a tokenizer whose vocabulary is the caption's words."""
    folder = tmp_path_factory.mktemp("small")
    make_small_text_encoder([CAPTION], folder, hidden=64, layers=1)
    return Tokenizer(folder / "tokenizer")


def ids_as_states(ids: np.ndarray, mask: np.ndarray) -> jax.Array:
    """Replaces the text encoder: the state of a token is its id."""
    assert ids.shape == mask.shape
    return jnp.asarray(ids, jnp.float32)[..., None]


def words(tokenizer: Tokenizer, states: jax.Array) -> list[str]:
    return [tokenizer._tokenizer.id_to_token(int(i)) for i in np.asarray(states)[0, :, 0]]


@pytest.mark.parametrize("max_length", [2, 5, 12, 300])
def test_positions_are_bos_and_the_caption(max_length: int, tokenizer: Tokenizer) -> None:
    cond, cond_mask, negative, negative_mask = encode_prompt(
        ids_as_states, tokenizer, CAPTION, "gray", max_length=max_length
    )
    expected = ["<bos>", "▁A", "▁small", "▁red", "▁house", "▁on", "▁a", "▁hill", "."]
    seen = (expected + ["<pad>"] * max_length)[:max_length]
    assert words(tokenizer, cond) == seen
    np.testing.assert_array_equal(cond_mask[0], [word != "<pad>" for word in seen])
    assert words(tokenizer, negative)[:2] == ["<bos>", "g"]
    assert negative.shape == cond.shape == (1, max_length, 1)
    assert negative_mask.shape == cond_mask.shape == (1, max_length)


def test_the_tower_reads_the_chi_prompt(tokenizer: Tokenizer) -> None:
    seen = []

    def tower(ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        seen.append(ids)
        return ids_as_states(ids, mask)

    encode_prompt(tower, tokenizer, CAPTION, max_length=10)
    chi = tokenizer.encode("\n".join(CHI_PROMPT))
    assert seen[0].shape == (1, len(chi) + 8)
    assert list(seen[0][0, : len(chi) - 1]) == chi[:-1]
    assert list(seen[1][0]) == [2] + [0] * 9  # the empty negative prompt: BOS, padding


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    texts = [CAPTION, "A red hill.", ""]
    states, mask = encode_texts(ids_as_states, tokenizer, texts, max_length=12)
    for i, text in enumerate(texts):
        one, one_mask = encode_texts(ids_as_states, tokenizer, [text], max_length=12)
        np.testing.assert_array_equal(states[i], one[0])
        np.testing.assert_array_equal(mask[i], one_mask[0])


def test_too_short_length_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="too short"):
        encode_prompt(ids_as_states, tokenizer, CAPTION, max_length=1)


def test_read_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeff  Ein Café,\nzwei Türme \n".encode())
    assert read_prompt(str(file)) == "Ein Café,\nzwei Türme"
    for text in ("", ".", "A cat.", "/", "x" * 5000, "see notes.txt or", "with \0 inside"):
        assert read_prompt(text) == text


def test_read_prompt_refuses(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    with pytest.raises(InputError, match="does not exist"):
        read_prompt(str(file))
    file.write_bytes(b" \n\t")
    with pytest.raises(InputError, match="empty"):
        read_prompt(str(file))
    file.write_bytes("Café".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_prompt(str(file))
    with pytest.raises(InputError, match="UTF-8"):
        read_prompt("Caf\udce9")


def test_a_prompt_that_is_cut_is_noted(
    tokenizer: Tokenizer, recwarn: pytest.WarningsRecorder
) -> None:
    count = len(tokenizer.encode(CAPTION))
    note_if_cut(tokenizer, CAPTION, count)
    note_if_cut(tokenizer, CAPTION, count + 2, "gray gray")
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"1 of its tokens come after the {count - 1}"):
        note_if_cut(tokenizer, CAPTION, count - 1)
