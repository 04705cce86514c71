"""What a training run carries from step to step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sanawm_jax.core.params import Params
from sanawm_jax.core.sharding import shardings
from sanawm_jax.training.engine.learner import MODEL, Learner, UpdateRule
from sanawm_jax.training.engine.spikes import Guard, new_guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree; the engine donates, shards, saves and restores it as such.

    Attributes:
      step: () int32, steps done, including those whose update was skipped.
      learners: every network that is trained, by name.
      guard: what finds bad gradients; None in a run that makes every update.
    """

    step: jax.Array
    learners: dict[str, Learner]
    guard: Guard | None = None

    @property
    def model(self) -> Learner:
        """The learner of a recipe that trains one network."""
        return self.learners[MODEL]

    @property
    def best(self) -> dict[str, Params]:
        """The weights of each learner that a run exports."""
        return {name: learner.best for name, learner in self.learners.items()}


def create_state(
    params: dict[str, Params],
    rules: dict[str, UpdateRule],
    mesh: Mesh | None = None,
    *,
    guarded: bool = False,
) -> TrainState:
    """A state at step 0.

    Args:
      params: initial weights of each learner; on a mesh, already placed.
      rules: of each learner.
      mesh: of `core.sharding.make_mesh`, on which moments and averages are placed as the weights
        are; None is one device and takes parameters of any name.
      guarded: bad gradients can be skipped, see `spikes`.
    """

    def make(params: dict[str, Params]) -> TrainState:
        # weights that the jit returned with shardings would be copies
        learners = {
            name: dataclasses.replace(rule.begin(params[name]), params={})
            for name, rule in rules.items()
        }
        return TrainState(jnp.zeros((), jnp.int32), learners, new_guard() if guarded else None)

    placed = None if mesh is None else shardings(jax.eval_shape(make, params), mesh)
    # without shardings of its outputs a jit puts zeros, which depend on nothing, on one device
    made = jax.jit(make, out_shardings=placed)(params)
    learners = {
        name: dataclasses.replace(learner, params=params[name])
        for name, learner in made.learners.items()
    }
    return dataclasses.replace(made, learners=learners)
