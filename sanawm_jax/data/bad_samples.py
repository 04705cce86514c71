"""Samples that cannot be read. The log names them, and a run with too many of them stops."""

from __future__ import annotations

from typing import NamedTuple

from absl import logging

from sanawm_jax.runtime.errors import InputError

_SHOWN = 200  # warnings that are logged; later ones are only counted


class Problem(NamedTuple):
    """Why samples were skipped.

    Attributes:
      file: the file that is damaged or missing.
      key: the sample's name; empty if the problem concerns several samples.
      reason: one line.
      samples: how many samples were skipped.
      is_bad: False if the data are good but do not fit the run, for example because a clip has too
        few frames. Such samples never stop a run.
    """

    file: str
    key: str
    reason: str
    samples: int = 1
    is_bad: bool = True


class BadSample(Exception):
    """A sample that cannot be used; `problem` says why."""

    def __init__(self, problem: Problem):
        super().__init__(f"{problem.file}, {problem.key}: {problem.reason}")
        self.problem = problem


class BadSampleCounter:
    """Counts the samples that were requested and those that were bad.

    Args:
      max_fraction: a run stops when the share of bad samples is larger than this.
      min_bad: fewer bad samples than this never stop a run.
    """

    def __init__(self, max_fraction: float = 0.05, min_bad: int = 10):
        self._max_fraction, self._min_bad = max_fraction, min_bad
        self.seen, self.bad, self.other = 0, 0, 0
        self._shown = 0

    def add(self, problem: Problem) -> None:
        """Logs a problem and counts its samples, both as seen and as skipped."""
        self.seen += problem.samples
        if problem.is_bad:
            self.bad += problem.samples
        else:
            self.other += problem.samples
        if self._shown < _SHOWN:
            what = f"sample {problem.key}" if problem.key else f"{problem.samples} samples"
            logging.warning("skipped %s of %s: %s", what, problem.file, problem.reason)
        elif self._shown == _SHOWN:
            logging.warning("more samples are skipped; from here on they are only counted")
        self._shown += 1

    def check(self) -> None:
        """Stops a run that skips too many samples.

        Raises:
          InputError: at least `min_bad` samples were bad, and they were more than `max_fraction` of
            all samples seen.
        """
        if self.bad >= self._min_bad and self.bad > self._max_fraction * self.seen:
            raise InputError(
                f"{self.bad} of {self.seen} samples could not be read, more than "
                f"data.max_bad_fraction={self._max_fraction:g}; the warnings above name them: "
                "repair or remove these files, or raise the limit"
            )
