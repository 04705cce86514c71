"""What a recipe gives to the engine: learners, data, their update, and how results are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from sanawm_jax.core.params import Params
from sanawm_jax.training.engine.held_out import HeldOut
from sanawm_jax.training.engine.learner import MODEL, UpdateRule, update_rule
from sanawm_jax.training.engine.step import GradientUpdate, Loss, Prepare, Update

if TYPE_CHECKING:  # it imports grain
    from sanawm_jax.data.zip_stream import ZipStream


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that differs between one training run and another.

    Attributes:
      abstract: shapes of the weights of each learner.
      init: shardings like `abstract`, or None -> initial weights of each learner.
      rules: of each learner; its moments and its average begin by them.
      update: one step, see `training.engine.step.Update`.
      resident: data that stay on the device. An entry `base` of a dict holds the weights of frozen
        networks, teachers for instance, which are sharded like trained weights.
      size: number of examples.
      export: best weights of each learner -> files.
      read: (K, B) indices -> arrays (K, B, ...) of the host, which `update` gets as its batch;
        None gives it the indices themselves, into `resident`.
      stream: (rows of a batch, seed) -> an iterator over these rows of the batches; a recipe that
        has one reads its examples itself.
      flops: of the part of a training step that one example causes; 0 if they are not counted.
      sample: (best weights of each learner, resident data, folder) -> writes what the weights make
        of some examples; None if the recipe shows nothing.
      held_out: how the run is measured on examples that it does not train on; None if it is not.
    """

    abstract: dict[str, Params]
    init: Callable[[Any], dict[str, Params]]
    rules: dict[str, UpdateRule]
    update: Update
    resident: Any
    size: int
    export: Callable[[dict[str, Params]], None]
    read: Callable[[np.ndarray], Any] | None = None
    stream: Callable[[np.ndarray, int], ZipStream] | None = None
    flops: float = 0.0
    sample: Callable[[dict[str, Params], Any, Path], None] | None = None
    held_out: HeldOut | None = None


def one_learner(
    config: ConfigDict,
    *,
    abstract: Params,
    init: Callable[[Any], Params],
    prepare: Prepare,
    loss: Loss,
    export: Callable[[Params], None],
    sample: Callable[[Params, Any, Path], None] | None = None,
    **data: Any,
) -> Recipe:
    """The recipe of a single network that descends a loss.

    Args:
      config: its `optimizer`, `steps`, `ema_decay` and `accumulation` count.
      abstract, init, export, sample: as in `Recipe`, of the one network.
      prepare, loss: see `training.engine.step`.
      data: the other fields of `Recipe`.

    Raises:
      InputError: see `update_rule`.
    """
    rule = update_rule(config.optimizer, config.steps, config.ema_decay)
    return Recipe(
        abstract={MODEL: abstract},
        init=lambda places: {MODEL: init(places and places[MODEL])},
        rules={MODEL: rule},
        update=GradientUpdate(rule, prepare, loss, config.accumulation),
        export=lambda best: export(best[MODEL]),
        sample=sample and (lambda best, *rest: sample(best[MODEL], *rest)),
        **data,
    )
