"""What a clip was encoded from, so that a later run notices when a source has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.data.own_videos import OwnVideo, images_of

Fingerprint = dict[str, Any]
_BLOCK = 1 << 20
_PARTS = {
    "film": "another film",
    "frames": "other frames",
    "intrinsics": "other intrinsics",
    "poses": "other poses",
    "dtype": "another --dtype",
    "caption": "another caption",
}


def fingerprint(video: OwnVideo, dtype: str, before: Fingerprint | None = None) -> Fingerprint:
    """Describes the source of a clip.

    Args:
      video: the source.
      dtype: in which the autoencoder ran.
      before: an earlier description; if its file has the same size and time, the content is not
        read again.

    Returns:
      JSON values: the stamp (sizes and times) and the hash of the film, and hashes of the numbers
      of the frames, of the intrinsics, of the poses and of the caption.
    """
    files = images_of(video.path) if video.path.is_dir() else [video.path]
    stats = [(file.name, file.stat()) for file in files]
    stamp = _hash(str([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode())
    known = (before or {}).get("film") if (before or {}).get("stamp") == stamp else None
    intrinsics = None if video.intrinsics is None else np.round(video.intrinsics, 3)
    return {
        "stamp": stamp,
        "film": known or _hash_files(files),
        "frames": _hash(video.numbers.astype(np.int64).tobytes()),
        "intrinsics": "" if intrinsics is None else _hash(intrinsics.tobytes()),
        "poses": _hash(np.round(video.c2w.astype(np.float64), 5).tobytes()),
        "dtype": dtype,
        "caption": _hash(video.caption.encode()),
    }


def difference(old: Fingerprint, new: Fingerprint) -> str | None:
    """Says in which part two descriptions differ first; None if they do not."""
    return next((text for name, text in _PARTS.items() if old.get(name) != new.get(name)), None)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        digest.update(file.name.encode() if len(files) > 1 else b"")
    return digest.hexdigest()
