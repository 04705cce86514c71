"""Records which layers of a network in host memory are on the device, for tests of `Streamer`."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import jax
import pytest

from sanawm_jax.memory import streaming


class Layers:
    """Counts layers by the arrays that were uploaded.

    Attributes:
      most: the largest number of layers that were on the device at the same time.
      brought: every layer that was uploaded, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seen: Callable[[], None] = lambda: None):
        self._arrays: list[tuple[int, weakref.ref]] = []
        self._number = itertools.count()
        self.most = 0
        self.brought: list[Any] = []
        bring = streaming.Streamer._bring

        def counted(streamer: Any, layer: Any) -> list[jax.Array]:
            arrays = bring(streamer, layer)
            number = next(self._number)
            self._arrays += [(number, weakref.ref(a)) for a in arrays]
            self.brought.append(layer)
            self.most = max(self.most, self.alive())
            seen()
            return arrays

        monkeypatch.setattr(streaming.Streamer, "_bring", counted)

    def alive(self) -> int:
        """Returns the number of layers on the device; a layer with two copies counts twice."""
        gc.collect()
        self._arrays = [(i, array) for i, array in self._arrays if array() is not None]
        return len({i for i, _ in self._arrays})

    def forget(self) -> None:
        """Resets the counts, except for the layers that are on the device."""
        self.most = self.alive()
        self.brought.clear()
