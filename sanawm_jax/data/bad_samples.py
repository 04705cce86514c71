"""Samples that cannot be read: named in the log, counted, and too many of them stop the run."""

from __future__ import annotations

from typing import NamedTuple

from absl import logging

from sanawm_jax.runtime.errors import InputError

_SHOWN = 200  # warnings; the rest is only counted


class Problem(NamedTuple):
    """Why samples were skipped.

    Attributes:
      file: that is damaged or missing.
      key: of the sample; empty if the file concerns several.
      reason: one line.
      samples: how many.
      is_bad: False is a property of good data, such as too few frames, that stops nothing.
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
    """Counts what was asked for and what was bad.

    Args:
      max_fraction: of bad samples among all, above which a run stops.
      min_bad: fewer never stop it.
    """

    def __init__(self, max_fraction: float = 0.05, min_bad: int = 10):
        self._max_fraction, self._min_bad = max_fraction, min_bad
        self.seen, self.bad, self.other = 0, 0, 0
        self._shown = 0

    def add(self, problem: Problem) -> None:
        """Logs and counts a problem; the samples count as seen too."""
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
        """Stops a run that skips too much.

        Raises:
          InputError: more than `max_fraction` of all samples seen were bad, and `min_bad` or more.
        """
        if self.bad >= self._min_bad and self.bad > self._max_fraction * self.seen:
            raise InputError(
                f"{self.bad} of {self.seen} samples could not be read, more than "
                f"data.max_bad_fraction={self._max_fraction:g}; the warnings above name them: "
                "repair or remove these files, or raise the limit"
            )
