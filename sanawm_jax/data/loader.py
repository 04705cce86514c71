"""An endless sequence of shuffled batches, whose position a checkpoint can store.

A source has random access: the clips of `open_clips`, or `range(n)` if all data stay on the
accelerator and a batch only holds their indices.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sanawm_jax.runtime.errors import InputError

if TYPE_CHECKING:
    import grain


def endless(dataset: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Repeats a data set for more epochs than a run can use, each with a new shuffle.

    Grain's own `repeat()` has the largest possible length, which overflows with batches of one.
    """
    return dataset.seed(seed).shuffle().repeat(sys.maxsize // (2 * len(dataset)))


class Loader:
    """An iterator of batches over a Grain `MapDataset`.

    Every epoch has a new global shuffle that depends only on the seed. A batch may hold the last
    examples of one epoch and the first ones of the next.

    Args:
      source: has `len(source)` and `source[i]`; elements are arrays, scalars or dicts of them.
      batch_size: elements per batch.
      seed: seed of the shuffles.
      num_threads: threads that read ahead; with 0 a batch is read when it is requested.

    Raises:
      InputError: the source is empty.
    """

    def __init__(self, source: Sequence, batch_size: int, *, seed: int, num_threads: int = 0):
        import grain

        if not len(source):
            raise InputError("there are no clips to train on")
        dataset = endless(grain.MapDataset.source(source), seed).batch(batch_size)
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=2 * num_threads if num_threads else 0
        )
        self._iterator = iter(dataset.to_iter_dataset(options))

    def next(self, steps: int) -> Any:
        """Returns the next `steps` batches, stacked on a new leading axis."""
        return jax.tree.map(lambda *a: np.stack(a), *(next(self._iterator) for _ in range(steps)))

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON values."""
        return self._iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at a position that `state` returned."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the threads."""
        self._iterator.close()
