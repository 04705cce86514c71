"""LoRA in training: which layers are adapted, and the loss of adapters on a frozen base."""

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
    """The adapters that `config.lora` describes; None at rank 0, which trains all weights.

    An alpha of 0 stands for the rank.

    Raises:
      InputError: see `core.lora.LoraConfig`.
    """
    lora = config.lora
    if lora.rank <= 0:
        return None
    return LoraConfig(lora.rank, tuple(lora.targets), lora.alpha or None)


@dataclasses.dataclass(frozen=True)
class AdaptedLoss:
    """Makes a loss of the whole weights a loss of adapters; `base` of the resident data is frozen.

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
