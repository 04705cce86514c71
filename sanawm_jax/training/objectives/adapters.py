"""LoRA of the world model: what a run's configuration adapts, and a loss on a frozen base."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from sanawm_jax.core.lora import LoraConfig, combine
from sanawm_jax.core.params import Params
from sanawm_jax.training.engine.step import Metrics


def lora_of(config: ConfigDict) -> LoraConfig | None:
    """What `config.lora` adapts; rank 0 trains all weights, alpha 0 is the rank.

    Raises:
      InputError: see `core.lora.LoraConfig`.
    """
    lora = config.lora
    if lora.rank <= 0:
        return None
    return LoraConfig(lora.rank, tuple(lora.targets), lora.alpha or None)


@dataclasses.dataclass(frozen=True)
class AdaptedLoss:
    """`loss` of base and adapters as a loss of adapters; the base is `base` of the resident data.

    Attributes:
      loss: (params, examples) -> loss, metrics.
    """

    loss: Callable[[Params, Any], tuple[jax.Array, Metrics]]

    def given(self, resident: Any) -> Callable[[Params, Any], tuple[jax.Array, Metrics]]:
        return functools.partial(self, base=resident["base"])

    def __call__(
        self, params: Params, examples: Any, *, base: Params | None = None
    ) -> tuple[jax.Array, Metrics]:
        return self.loss(combine(base or {}, params), examples)
