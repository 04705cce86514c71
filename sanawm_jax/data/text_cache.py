"""Hidden states of captions, which the text encoder computes once. Imports numpy and no JAX.

Axis letters: U distinct captions, L text tokens, C width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.json_file import read_note

SAVE_EVERY = 16  # batches between two updates of the progress file
_NOTE = "captions.json"


class TextCache:
    """A folder of encoded captions. A call with a caption returns its hidden states and mask.

    The files are memory maps. A pickled cache opens them again in the process that loads it.

    Raises:
      InputError: the folder that the constructor gets is not complete.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        note = _read_note(self._folder)
        self._rows = {caption: row for row, caption in enumerate(note.get("captions", []))}
        if not self._rows or note["done"] < len(self._rows):
            raise InputError(f"{self._folder} holds no finished cache of captions")
        self._map()

    def _map(self) -> None:
        self._text = np.load(self._folder / "text.npy", mmap_mode="r")
        self._mask = np.load(self._folder / "text_mask.npy", mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def __call__(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns hidden states (L, C) float16 and mask (L,) bool. "" is the null caption."""
        row = self._rows[caption]
        return np.array(self._text[row]), np.array(self._mask[row])

    @property
    def width(self) -> int:
        """C."""
        return self._text.shape[-1]


def build_text_cache(
    folder: str | Path,
    captions: Sequence[str],
    encode: Callable[[Sequence[str]], tuple[Any, Any]],
    *,
    fingerprint: str,
    batch_size: int = 8,
) -> TextCache:
    """Encodes all captions and the empty one, and continues where an interrupted call stopped.

    Args:
      folder: where text.npy (U, L, C) float16, text_mask.npy (U, L) bool and captions.json are
        written.
      captions: in any order.
      encode: texts -> hidden states (B, L, C) and mask (B, L). The empty text is never in one
        batch with other texts.
      fingerprint: identifies weights and length. A cache with another fingerprint or other captions
        is discarded and made again.
      batch_size: B.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The empty caption has its own batch, because the others are encoded after an instruction.
    unique = [*sorted({*captions} - {""}), ""]
    digest = hashlib.sha256(json.dumps(unique).encode()).hexdigest()[:16]
    name = f"{fingerprint}-{digest}"
    note = _read_note(folder)
    done = note["done"] if note.get("fingerprint") == name else 0
    arrays: tuple[np.ndarray, np.ndarray] | None = None
    last = len(unique) - 1
    starts = [*range(done, last, batch_size), *([last] if done <= last else [])]
    for count, start in enumerate(starts, 1):
        part = unique[start : min(start + batch_size, last)] or [""]
        # A short batch is filled up, so that all batches have one shape and one program.
        text, mask = encode(part + [part[-1]] * (batch_size - len(part)))
        text, mask = np.asarray(text, np.float16), np.asarray(mask) > 0
        if arrays is None:
            arrays = _open(folder, text, mask, len(unique), is_new=not start)
        stop = start + len(part)
        arrays[0][start:stop], arrays[1][start:stop] = text[: len(part)], mask[: len(part)]
        if stop == len(unique) or count % SAVE_EVERY == 0:
            for array in arrays:
                array.flush()  # pyright: ignore[reportAttributeAccessIssue]
            with atomic_write(folder / _NOTE) as partial:
                record = {"fingerprint": name, "done": stop, "captions": unique}
                partial.write_text(json.dumps(record), encoding="utf-8")
            logging.info("encoded %d of %d captions", stop, len(unique))
    return TextCache(folder)


def _open(
    folder: Path, text: np.ndarray, mask: np.ndarray, length: int, *, is_new: bool
) -> tuple[np.ndarray, np.ndarray]:
    opened = []
    for name, like in (("text", text), ("text_mask", mask)):
        file = folder / f"{name}.npy"
        if is_new:
            shape = (length, *like.shape[1:])
            opened.append(np.lib.format.open_memmap(file, mode="w+", dtype=like.dtype, shape=shape))
        else:
            opened.append(np.load(file, mmap_mode="r+"))
    return opened[0], opened[1]


def _read_note(folder: Path) -> dict[str, Any]:
    return {"done": 0, **read_note(folder / _NOTE)}
