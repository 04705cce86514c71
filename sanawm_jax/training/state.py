"""What a training run carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sanawm_jax.core.params import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Plain trees; nothing here knows the model.

    Attributes:
      step: () int32, updates done.
      params: float32 masters.
      opt_state: of the Optax optimizer.
      ema: float32 moving average of `params`, what is exported.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params


def create_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0; `params` may hold loaded weights."""
    # the step donates its input, so the average must not share buffers with the parameters
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params), ema)
