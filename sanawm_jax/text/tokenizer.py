"""Token ids from a published `tokenizer.json`.

Reference: transformers `GemmaTokenizer`; ids, truncation and padding equal those of this class.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.checkpoints.files import read_config
from sanawm_jax.runtime.errors import InputError

# A `tokenizers.Tokenizer` holds its truncation and padding as settings that all threads share.
_SETTINGS = threading.Lock()


def _content(token: Any) -> str | None:
    """The text of a special token; the configuration holds a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


class Tokenizer:
    """The tokenizer of one folder, for example `tokenizer/`.

    `tokenizer.json` says how text is split and that BOS comes first. `tokenizer_config.json`, if it
    exists, gives the padding token (otherwise `<pad>`) and the side on which text is truncated
    (otherwise right).

    Raises:
      InputError: the folder or tokenizer.json does not exist or is damaged, or the padding token is
        unknown.
    """

    def __init__(self, folder: str | Path):
        import tokenizers

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                f"{file} does not exist; a tokenizer folder holds tokenizer.json "
                "(a sentencepiece tokenizer.model alone is not read)"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{file} is not a tokenizer file ({reason}); fetch it again"
            ) from error
        has_config = (folder / "tokenizer_config.json").is_file()
        config = read_config(folder, "tokenizer_config.json") if has_config else {}
        self._pad_token = _content(config.get("pad_token")) or "<pad>"
        pad_id = self._tokenizer.token_to_id(self._pad_token)
        if pad_id is None:
            raise InputError(f"{file} lacks the padding token {self._pad_token!r}")
        self.pad_id: int = pad_id
        baked = self._tokenizer.truncation or {}
        self._truncation_side = baked.get("direction") or config.get("truncation_side") or "right"
        # the file's own truncation and padding must not apply to `encode`
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of ids, including added tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text with its special tokens, without truncation and padding."""
        with _SETTINGS:
            return self._tokenizer.encode(text).ids

    def __call__(
        self, texts: Sequence[str], max_length: int, *, padding_side: str = "right"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of texts, truncated and padded to one length.

        Args:
          texts: B strings.
          max_length: L, including special tokens.
          padding_side: right, or left, as the refiner needs it.

        Returns:
          ids and mask, both (B, L) int32; mask is 1 on tokens and 0 on padding.

        Raises:
          InputError: max_length has no room for tokens besides the special ones.
        """
        special = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= special:
            raise InputError(f"text length {max_length} is too short; use {special + 1} or more")
        tokenizer = self._tokenizer
        with _SETTINGS:
            tokenizer.enable_truncation(max_length, direction=self._truncation_side)
            tokenizer.enable_padding(
                length=max_length,
                pad_id=self.pad_id,
                pad_token=self._pad_token,
                direction=padding_side,
            )
            try:
                encodings = tokenizer.encode_batch(list(texts))
            finally:
                tokenizer.no_truncation()
                tokenizer.no_padding()
        ids = np.array([e.ids for e in encodings], np.int32).reshape(-1, max_length)
        mask = np.array([e.attention_mask for e in encodings], np.int32).reshape(-1, max_length)
        return ids, mask
