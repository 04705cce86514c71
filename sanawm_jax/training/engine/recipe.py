"""What a recipe gives to the engine: weights, data, the loss, and how results are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sanawm_jax.core.params import Params
from sanawm_jax.training.engine.step import Loss, Prepare

if TYPE_CHECKING:  # it imports grain
    from sanawm_jax.data.zip_stream import ZipStream


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that differs between one training run and another.

    Attributes:
      abstract: shapes of the weights.
      init: shardings or None -> initial weights.
      resident: data that stay on the device. An entry `base` of a dict holds the weights of frozen
        networks, which are sharded like trained weights.
      size: number of examples.
      prepare, loss: see `training.engine.step`.
      export: averaged weights -> files.
      read: (K, B) indices -> arrays (K, B, ...) of the host, what `prepare` gets as its batch;
        None gives it the indices themselves, into `resident`.
      stream: (rows of a batch, seed) -> an iterator over these rows of the batches; a recipe that
        has one reads its examples itself.
      flops: of the part of a training step that one example causes; 0 if they are not counted.
      sample: (weights, resident data, folder) -> writes what the weights make of some examples;
        None if the recipe shows nothing.
    """

    abstract: Params
    init: Callable[[Any], Params]
    resident: Any
    size: int
    prepare: Prepare
    loss: Loss
    export: Callable[[Params], None]
    read: Callable[[np.ndarray], Any] | None = None
    stream: Callable[[np.ndarray, int], ZipStream] | None = None
    flops: float = 0.0
    sample: Callable[[Params, Any, Path], None] | None = None
