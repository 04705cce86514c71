"""Writes safetensors one tensor at a time, in shards with an index as folders on the hub are."""

from __future__ import annotations

import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.checkpoints.files import DTYPES
from sanawm_jax.runtime.atomic import atomic_write

MAX_SHARD_BYTES = 10 * 10**9  # of diffusers' `save_pretrained`
_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
Spec = tuple[tuple[int, ...], Any]  # shape, dtype


def num_bytes(spec: Spec) -> int:
    """Bytes of a tensor of this shape and dtype."""
    shape, dtype = spec
    return math.prod(shape) * np.dtype(dtype).itemsize


def plan_shards(specs: Mapping[str, Spec], max_bytes: int) -> list[list[str]]:
    """Names in order, divided so that no shard of several tensors is larger than `max_bytes`."""
    shards: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        size = num_bytes(spec)
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_file(
    path: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    *,
    workers: int = 1,
) -> None:
    """Writes one safetensors file with at most `workers` tensors in memory.

    Args:
      path: the file; it appears when it is complete.
      specs: name -> shape and dtype, in the order of the file.
      read: name -> the tensor.
      workers: threads that read; 1 uses the thread of the caller.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        start, end = end, end + num_bytes((shape, dtype))
        kind = _NAMES[np.dtype(dtype).name]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        values = _read_ahead(read, list(specs), workers)
        for (name, (shape, dtype)), tensor in zip(specs.items(), values, strict=True):
            value = np.asarray(tensor, dtype, order="C")
            assert value.shape == shape, (name, value.shape, shape)
            file.write(value.reshape(-1).view(np.uint8).data)


def _read_ahead(
    read: Callable[[str], np.ndarray], names: list[str], workers: int
) -> Iterator[np.ndarray]:
    """Yields the tensors in order, and reads the next `workers - 1` meanwhile."""
    if workers == 1:
        yield from map(read, names)
        return
    with ThreadPoolExecutor(workers - 1) as pool:
        pending: deque[Future[np.ndarray]] = deque()
        for name in names:
            pending.append(pool.submit(read, name))
            if len(pending) == workers - 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_folder(
    folder: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    *,
    stem: str = "diffusion_pytorch_model",
    max_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
) -> None:
    """Writes `STEM.safetensors`, or its shards and `STEM.safetensors.index.json` if larger.

    Args:
      folder: made if absent.
      specs, read, workers: see `write_file`.
      stem: `diffusion_pytorch_model`, or `model` for a text encoder.
      max_bytes: of one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(specs, max_bytes)
    if len(shards) <= 1:
        write_file(folder / f"{stem}.safetensors", specs, read, workers=workers)
        return
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {n: specs[n] for n in names}, read, workers=workers)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(num_bytes(spec) for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all; the folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a component's folder; links into the hub's cache become files."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            with atomic_write(target / file.name) as partial:
                shutil.copyfile(file, partial)
