"""Reads small-world sets back: all parts of a split as one random-access source."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from sanawm_jax.runtime.errors import InputError

DATASET_NAME = "small_world"
_VERSION = "[0-9]*"  # a killed run may leave incomplete.* folders
_PART = re.compile(r"part_(\d+)_of_(\d+)")


class ClipSource(Sequence):
    """Concatenation of random-access sources, itself one: `len(source)` and `source[i]`.

    Clips are dicts as `small_world.clip.make_clip` returns them; texts come back as str.
    """

    def __init__(self, sources: Sequence):
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(len(s) for s in self._sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict:  # pyright: ignore[reportIncompatibleMethodOverride]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"clip {index} of a set of {len(self)}")
        part = bisect.bisect_right(self._ends, position)
        start = self._ends[part - 1] if part else 0
        clip = dict(self._sources[part][int(position - start)])
        for name, value in clip.items():
            if isinstance(value, bytes):
                clip[name] = value.decode()
        clip["seed"] = int(clip["seed"])
        return clip


def find_parts(data_dir: str | Path) -> list[str]:
    """Names of the finished parts under `data_dir`, in order.

    Raises:
      InputError: no part, parts of sets cut differently, or some parts of the set missing.
    """
    root = Path(data_dir).expanduser() / DATASET_NAME
    parts = sorted({p.parents[1].name for p in root.glob(f"*/{_VERSION}/dataset_info.json")})
    if not parts:
        raise InputError(
            f"no small-world set in {data_dir}; "
            "make one with python -m sanawm_jax.small_world.generate"
        )
    numbered = [m for m in map(_PART.fullmatch, parts) if m]
    totals = {int(m[2]) for m in numbered}
    if len(totals) > 1:
        raise InputError(f"{root} mixes sets cut into {sorted(totals)} parts; name parts to read")
    if totals and len(numbered) < min(totals):
        raise InputError(
            f"{root} has {len(numbered)} of {min(totals)} parts; run the same generate command "
            "again to finish the set"
        )
    return parts


def open_clips(
    data_dir: str | Path, split: str = "train", parts: Sequence[str] | None = None
) -> ClipSource:
    """Open a split of a generated set for random access, without TensorFlow.

    Args:
      data_dir: what `small_world.generate` was given as --data_dir.
      split: "train" or "validation".
      parts: names of the parts to read; all by default.

    Raises:
      InputError: the set, a part or the split is missing.
    """
    import tensorflow_datasets as tfds

    sources = []
    names = find_parts(data_dir) if parts is None else list(parts)
    for name in names:
        root = Path(data_dir).expanduser() / DATASET_NAME / name
        versions = sorted(p.parent for p in root.glob(f"{_VERSION}/dataset_info.json"))
        if not versions:
            raise InputError(f"no part {name} in {root.parent}; there are: {find_parts(data_dir)}")
        builder = tfds.builder_from_directory(versions[-1])
        # A small split may be empty in some of the parts.
        if split in builder.info.splits:
            # a decorator of tfds hides the parameters
            sources.append(builder.as_data_source(split=split))  # pyright: ignore[reportCallIssue]
    if not sources:
        raise InputError(f"the set in {data_dir} has no split {split!r}; use train or validation")
    return ClipSource(sources)
