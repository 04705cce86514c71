"""A network that is trained, and the rule by which gradients change it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sanawm_jax.core.params import Params
from sanawm_jax.training.engine.optimizer import ema_decay, learning_rate, make_optimizer

MODEL = "model"  # the only learner of a recipe that trains one network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """Plain trees; nothing here knows the network.

    Attributes:
      params: float32 master weights.
      moments: state of the Optax optimizer.
      average: float32 moving average of `params`; None if none is kept.
    """

    params: Params
    moments: Any
    average: Params | None = None

    @property
    def best(self) -> Params:
        """The weights that a run exports: the average, or `params` if there is none."""
        return self.params if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """How a learner follows its gradients.

    Attributes:
      optimizer: at learning rate 1.
      rate: (() int32 step of the run, () share of the time limit used up) -> learning rate.
      decay: of the moving average; 0 keeps none.
    """

    optimizer: optax.GradientTransformation
    rate: Callable[[jax.Array, jax.Array], jax.Array]
    decay: float = 0.0

    def begin(self, params: Params) -> Learner:
        """A learner that has made no update yet."""
        # the compiled step donates its state, so the average must not share buffers with params
        average = jax.tree.map(jnp.copy, params) if self.decay > 0 else None
        return Learner(params, self.optimizer.init(params), average)

    def update(
        self, learner: Learner, gradients: Params, step: jax.Array, wall_fraction: jax.Array
    ) -> tuple[Learner, dict[str, jax.Array]]:
        """The learner after one update, and the metrics `learning_rate` and `grad_norm`."""
        before, average = learner.params, learner.average
        updates, moments = self.optimizer.update(gradients, learner.moments, before)
        rate = self.rate(step, wall_fraction)
        params: Any = optax.apply_updates(before, jax.tree.map(lambda u: rate * u, updates))
        if average is not None:
            average: Any = optax.incremental_update(
                params, average, 1.0 - ema_decay(step, self.decay)
            )
        metrics = {"learning_rate": rate, "grad_norm": optax.global_norm(gradients)}
        return Learner(params, moments, average), metrics


def update_rule(optimizer: ConfigDict, num_steps: int, decay: float) -> UpdateRule:
    """The rule that the fields of `config.optimizer` describe; see `configs.common.training`.

    Args:
      num_steps: of the run, over which the learning rate falls.
      decay: of the moving average; 0 keeps none.

    Raises:
      InputError: an optimizer, a dtype or a schedule that does not exist.
    """
    fields = optimizer.to_dict()
    of_rate = {n: fields.pop(n) for n in ("warmup_steps", "schedule", "final_fraction")}
    peak = fields.pop("learning_rate")
    rate = functools.partial(learning_rate, peak=peak, num_steps=num_steps, **of_rate)
    return UpdateRule(make_optimizer(**fields), rate, decay)
