"""An endless sequence of batches of a zip-latent set. Threads or worker processes read ahead.

Every epoch has a new global shuffle that depends on the seed. Position p of the endless sequence is
row p mod B of batch p div B on every host and in every worker, so neither the number of hosts nor
the number of workers changes a batch. A sample that cannot be read is replaced by another one. The
position and the seed decide which, so a resumed run uses the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from sanawm_jax.data.bad_samples import BadSample, BadSampleCounter, Problem
from sanawm_jax.data.loader import endless
from sanawm_jax.data.zip_latents import ZipLatents
from sanawm_jax.runtime.errors import InputError

MAX_TRIES = 100  # attempts to replace one sample; this is upstream's number
_PROBLEMS = "problems"


class ZipStream:
    """Reads this host's rows of the batches. The position can be stored, as in `loader.Loader`.

    Args:
      source: the samples.
      batch_size: B, rows of all hosts together.
      seed: seed of the shuffles, of the choice of captions and of the replacements.
      counter: counts the samples that cannot be read.
      rows: the rows of a batch that this host reads, in ascending order; by default all.
      num_workers: processes that read ahead; 0 reads in threads of this process.
      num_threads: threads per process that read ahead; with 0 a batch is read when it is requested.
      buffer: batches that each thread or process keeps ready.
    """

    def __init__(
        self,
        source: ZipLatents,
        batch_size: int,
        *,
        seed: int,
        counter: BadSampleCounter,
        rows: np.ndarray | None = None,
        num_workers: int = 0,
        num_threads: int = 1,
        buffer: int = 2,
    ):
        rows = np.arange(batch_size) if rows is None else rows
        order = endless(grain.MapDataset.range(len(source)), seed)
        self._order, self._batch_size = order, batch_size
        samples = order.map_with_index(_Reader(source, seed))
        self._batches = _HostRows(samples, batch_size, rows).batch(len(rows), batch_fn=_stack)
        self._options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=max(buffer, 1) * num_threads
        )
        self._workers = grain.MultiprocessingOptions(
            num_workers=num_workers, per_worker_buffer_size=max(buffer, 1)
        )
        self._counter = counter
        self._rows = len(rows)
        self._fingerprint = source.index.fingerprint()
        self._position = 0
        self._iterator: Any = None

    def next(self, steps: int) -> dict[str, np.ndarray]:
        """Returns this host's rows of the next batches, arrays (steps, rows, ...).

        Raises:
          InputError: too many samples could not be read.
        """
        batches = [self._next_batch() for _ in range(steps)]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def indices(self, steps: int) -> np.ndarray:
        """Returns the numbers of the samples in the last batches of all hosts, (steps, B)."""
        first = (self._position - steps) * self._batch_size
        places = range(first, self._position * self._batch_size)
        return np.array([self._order[place] for place in places]).reshape(steps, -1)

    def _next_batch(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start()
        batch = dict(next(self._iterator))
        self._position += 1
        self._counter.seen += self._rows
        problems = [Problem(*fields) for fields in batch.pop(_PROBLEMS)]
        for problem in problems:
            self._counter.add(problem)
        self._counter.check()
        if not batch:
            raise InputError(
                f"{MAX_TRIES} samples in a row cannot be used, the last one of "
                f"{problems[-1].file}: {problems[-1].reason}"
            )
        return batch

    def _start(self) -> Iterator[dict[str, Any]]:
        # The iterators of worker processes have their own states. The position is therefore a slice
        # of the endless sequence, which is valid for any number of workers.
        dataset = self._batches[self._position :].to_iter_dataset(self._options)
        if self._workers.num_workers:
            if not flags.FLAGS.is_parsed():  # Grain's processes read the flags of absl
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(self._workers)
        return iter(dataset)

    def state(self) -> dict[str, Any]:
        """Returns the position and the counts as JSON values."""
        counter = self._counter
        return {
            "batch": self._position,
            "samples": self._fingerprint,
            "counts": [counter.seen, counter.bad, counter.other],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at a position that `state` returned."""
        if state["samples"] != self._fingerprint:
            logging.warning(
                "the data are not those of the checkpoint, so their order changes from here on"
            )
        self.close()
        self._position = int(state["batch"])
        self._counter.seen, self._counter.bad, self._counter.other = state["counts"]

    def close(self) -> None:
        """Ends the worker processes; `next` starts new ones."""
        if self._iterator is not None:
            if self._counter.bad:
                logging.warning(
                    "%d of %d samples could not be read", self._counter.bad, self._counter.seen
                )
            self._iterator.close()
            self._iterator = None


class _Reader:
    """Maps (position, number of a sample) to the arrays of the sample or of its replacement."""

    def __init__(self, source: ZipLatents, seed: int):
        self._source, self._seed = source, seed

    def __call__(self, position: int, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([self._seed, position])
        problems: list[Problem] = []
        for _ in range(MAX_TRIES):
            try:
                return {**self._source.read(int(number), rng), _PROBLEMS: problems}
            except BadSample as error:
                problems.append(error.problem)
                number = int(rng.integers(len(self._source)))
        return {_PROBLEMS: problems}


class _HostRows(grain.MapDataset):
    """Selects the rows of one host from the endless sequence of the rows of all batches."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def _stack(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the arrays by name and joins the problems.

    If a sample has no arrays, the result holds only its problems.
    """
    problems = [tuple(problem) for sample in samples for problem in sample[_PROBLEMS]]
    failed = next((sample for sample in samples if len(sample) == 1), None)
    if failed is not None:
        return {_PROBLEMS: [tuple(problem) for problem in failed[_PROBLEMS]]}
    names = [name for name in samples[0] if name != _PROBLEMS]
    return {**{n: np.stack([s[n] for s in samples]) for n in names}, _PROBLEMS: problems}
