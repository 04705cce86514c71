"""Strict two-way mapping between published tensor names and our parameter trees.

A model's table lists, for every leaf of its abstract tree, the source tensors that fill it: one
`Entry` for a plain leaf, and one per layer for a stacked leaf. `load` refuses tensors that are
missing, unexpected or of another shape, and names all of them at once; `export` uses the same table
in the other direction.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from sanawm_jax.checkpoints.copies import copy_into
from sanawm_jax.core.params import Params, from_leaves, leaves
from sanawm_jax.runtime.errors import InputError

_AHEAD_BYTES = 1 << 30


class TensorSource(Protocol):
    """Named tensors whose shapes are known before their data are read."""

    def keys(self) -> Iterable[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> np.dtype: ...
    def read(self, key: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf is laid out in the source: axes of ours in the order of theirs."""

    axes: tuple[int, ...] | None = None  # theirs = transpose(ours, axes) ...
    ones: tuple[int, ...] = ()  # ... with axes of length 1 at these places

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        value = ours if self.axes is None else np.transpose(ours, self.axes)
        return np.expand_dims(value, self.ones)

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        value = np.squeeze(theirs, self.ones)
        return value if self.axes is None else np.transpose(value, np.argsort(self.axes))


SAME = Layout()
LINEAR = Layout((1, 0))  # (in, out) <-> (out, in)
LINEAR_AS_CONV2D = Layout((1, 0), ones=(2, 3))  # (in, out) <-> (out, in, 1, 1)
CONV1D = Layout((2, 1, 0))  # (k, in, out) <-> (out, in, k)
CONV2D = Layout((3, 2, 0, 1))
CONV3D = Layout((4, 3, 0, 1, 2))


def default_layout(leaf_name: str, ndim: int) -> Layout:
    """The layout that a leaf's name and rank imply: kernels as in torch, all else unchanged."""
    if leaf_name != "kernel":
        return SAME
    return {2: LINEAR, 3: CONV1D, 4: CONV2D, 5: CONV3D}[ndim]


def default_name(path: str) -> str:
    """The name in torch: `a.b.kernel` and `a.b.scale` are `a.b.weight`; other names stay."""
    parent, _, name = path.rpartition(".")
    name = {"kernel": "weight", "scale": "weight"}.get(name, name)
    return f"{parent}.{name}" if parent else name


@dataclasses.dataclass(frozen=True)
class Entry:
    """One source tensor and where it goes: `tree[path][index]`."""

    source: str
    path: str
    index: tuple[int, ...] = ()
    layout: Layout = SAME


def table(
    abstract: Params,
    name: Callable[[str, tuple[int, ...]], str] | None = None,
    *,
    stacked: Callable[[str], int] = lambda path: 0,
    layout: Callable[[str, int], Layout] | None = None,
) -> list[Entry]:
    """Enumerates the entries of an abstract tree.

    Args:
      abstract: tree of shapes.
      name: (path, index) -> source name; `default_name` of the path by default.
      stacked: path -> number of leading stacked axes of that leaf.
      layout: (path, ndim without stacked axes) -> layout; by leaf name by default.
    """
    entries = []
    for path, leaf in leaves(abstract):
        depth = stacked(path)
        ndim = leaf.ndim - depth
        how = layout(path, ndim) if layout else default_layout(path.rpartition(".")[2], ndim)
        for index in itertools.product(*(range(n) for n in leaf.shape[:depth])):
            source = name(path, index) if name else default_name(path)
            entries.append(Entry(source, path, index, how))
    sources = [e.source for e in entries]
    if len(set(sources)) != len(sources):
        twice = sorted({s for s in sources if sources.count(s) > 1})
        raise ValueError(f"two leaves claim the same source tensor: {twice[:5]}")
    return entries


def _theirs(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    empty = np.broadcast_to(np.zeros(()), shape[len(entry.index) :])  # a shape, no memory
    return entry.layout.to_theirs(empty).shape


def shapes(entries: list[Entry], abstract: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the source tensors by name, from the shapes of our leaves by dotted path."""
    return {e.source: _theirs(e, abstract[e.path].shape) for e in entries}


def _listed(names: list[str]) -> str:
    head = ", ".join(names[:8])
    return head + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check(
    entries: list[Entry],
    abstract: Params,
    source: TensorSource,
    *,
    what: str,
    ignore: Callable[[str], bool] = lambda key: False,
) -> None:
    """Compares names and shapes before any data are read.

    Args:
      what: what messages call these weights, usually their path.
      ignore: source names that are skipped on purpose.

    Raises:
      InputError: one line that lists missing, unexpected and mis-shaped tensors.
    """
    expected = shapes(entries, dict(leaves(abstract)))
    found = set(source.keys())
    missing = sorted(expected.keys() - found)
    unexpected = sorted(k for k in found - expected.keys() if not ignore(k))
    wrong = [
        f"{k} {source.shape(k)} instead of {expected[k]}"
        for k in sorted(expected.keys() & found)
        if tuple(source.shape(k)) != expected[k]
    ]
    problems = [
        f"{label} {len(names)}: {_listed(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", wrong),
        )
        if names
    ]
    if problems:
        raise InputError(f"{what} does not fit its configuration; {'; '.join(problems)}")


def load(
    entries: list[Entry],
    abstract: Params,
    source: TensorSource,
    *,
    what: str,
    dtype: Any = None,
    sharding: Any = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
    ignore: Callable[[str], bool] = lambda key: False,
) -> Params:
    """Reads a parameter tree, strictly; tensors are read and cast by several threads.

    Args:
      entries: the model's table.
      abstract: its tree of shapes.
      source: the published tensors.
      what: what messages call these weights.
      dtype: dtype of the floating leaves; None keeps the file's.
      sharding: a sharding or a tree of them for `jax.device_put`; None is the default device.
      place: (dotted path, array) -> leaf or a dict of leaves; replaces the copy to the device.
      ignore: source names that are skipped on purpose.

    Raises:
      InputError: see `check`.
    """
    check(entries, abstract, source, what=what, ignore=ignore)
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    shardings = dict(leaves(sharding)) if isinstance(sharding, dict) else None
    flat = {}

    def fill(host: np.ndarray, entry: Entry) -> None:
        value = entry.layout.to_ours(source.read(entry.source))
        copy_into(host[(*entry.index, ...)], value)

    def finish(path: str, host: np.ndarray, jobs: list[Future[None]]) -> None:
        for job in jobs:
            job.result()
        if place is not None:
            flat[path] = place(path, host)
        else:
            flat[path] = jax.device_put(host, shardings[path] if shardings else sharding)

    pending: deque[tuple[str, np.ndarray, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for path, leaf in leaves(abstract):
            kept = source.dtype(by_path[path][0].source)
            is_cast = dtype is not None and _is_float(kept)
            # the stack is allocated once, in its final dtype
            host = np.empty(leaf.shape, dtype if is_cast else kept)
            pending.append((path, host, [pool.submit(fill, host, e) for e in by_path[path]]))
            # bounds what is read ahead while earlier leaves go to the device
            while pending and sum(host.nbytes for _, host, _ in pending) > _AHEAD_BYTES:
                finish(*pending.popleft())
        while pending:
            finish(*pending.popleft())
    return from_leaves(flat)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8"))


def export(
    entries: list[Entry], params: Params, extra: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Our tree as published tensors; `load(export(p)) == p` bit for bit.

    Args:
      extra: tensors of the layout that are not parameters here.
    """
    flat = {path: np.asarray(leaf) for path, leaf in leaves(params)}
    out = dict(extra or {})
    for entry in entries:
        value = entry.layout.to_theirs(flat[entry.path][entry.index])
        out[entry.source] = np.asarray(value, order="C")  # ascontiguousarray has no scalars
    return out
