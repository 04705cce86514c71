"""What a training run carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sanawm_jax.core.params import Params
from sanawm_jax.core.sharding import shardings
from sanawm_jax.training.engine.spikes import Guard, new_guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Plain trees; nothing here knows the model.

    Attributes:
      step: () int32, steps done, those whose update was left out included.
      params: float32 masters.
      opt_state: of the Optax optimizer.
      ema: float32 moving average of `params`, what is exported; None in a run that keeps none.
      guard: what finds bad gradients; None in a run that makes every update.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    guard: Guard | None = None

    @property
    def best(self) -> Params:
        """What a run exports: the average, or without one the weights."""
        return self.params if self.ema is None else self.ema


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    average: bool = True,
    guarded: bool = False,
) -> TrainState:
    """A state at step 0; `params` may hold loaded weights.

    Args:
      params: on a mesh, already placed.
      optimizer: its moments are placed by the same rules.
      average: keep a moving average.
      guarded: bad gradients can be left out, see `training.spikes`.
      mesh: of `core.sharding.make_mesh`; None is one device and takes parameters of any name.
    """

    def make(params: Params) -> TrainState:
        # the step donates its input, so the average must not share buffers with the parameters
        ema = jax.tree.map(jnp.copy, params) if average else None
        guard = new_guard() if guarded else None
        # the parameters themselves are no output: given shardings, a jit would copy them
        return TrainState(jnp.zeros((), jnp.int32), {}, optimizer.init(params), ema, guard)

    placed = None if mesh is None else shardings(jax.eval_shape(make, params), mesh)
    # without shardings of its outputs a jit puts zeros, which depend on nothing, on one device
    made = jax.jit(make, out_shardings=placed)(params)
    return dataclasses.replace(made, params=params)
