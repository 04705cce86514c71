"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of any model.

    y = x W + b + scale (x A) B,  scale = alpha / rank,  A (C, R) and B (R, C_out)

Adapters are a separate tree of parameters. It has the model's paths with `lora_a` and `lora_b`
instead of `kernel`, stacked along the same leading axes. Training uses only this tree: gradients,
optimizer, average and checkpoints do not contain the base model, which stays frozen. For a forward
pass, `combine` joins the two trees, and a layer computes (x A) B and never A B. For sampling,
`merge_lora` adds A B to the kernels once.

Axis letters: R rank, C input channels, C_out output channels; leading axes are those along which
layers are stacked.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from sanawm_jax.core.layers import Linear
from sanawm_jax.core.params import Params, build_with, from_leaves, leaves
from sanawm_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The layers that get adapters, and the adapters' rank and scale.

    Attributes:
      rank: R.
      targets: regular expressions for the whole dotted path of a linear layer, for example
        `blocks\\.attn\\.(q|k|v)`.
      alpha: numerator of the scale; None stands for the rank, so that the scale is 1.

    Raises:
      InputError: the rank or alpha is not positive, there is no target, or an expression is not
        valid.
    """

    rank: int
    targets: tuple[str, ...]
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank={self.rank} must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"lora.alpha={self.alpha} must be positive")
        if not self.targets:
            raise InputError("lora.targets is empty; name the layers to adapt")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise InputError(f"lora.targets: {target!r} is no expression ({error})") from None

    @property
    def scale(self) -> float:
        """The factor of the product A B."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def _add_adapters(model: nnx.Module, config: LoraConfig) -> None:
    """Adds the two factors A and B to every targeted `Linear` of an abstract model."""
    linear = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    for target in config.targets:
        found = [path for path in linear if re.fullmatch(target, path)]
        if not found:
            raise InputError(
                f"lora.targets: no linear layer matches {target!r}; layers are "
                f"{', '.join(sorted(linear)[:8])}..."
            )
        for path in found:
            module = linear[path]
            if hasattr(module, "lora_a"):
                continue
            *stack, inputs, outputs = module.kernel[...].shape
            if config.rank > min(inputs, outputs):
                raise InputError(
                    f"lora.rank={config.rank} is more than {path}'s full rank, "
                    f"{min(inputs, outputs)}"
                )
            module.lora_a = nnx.LoRAParam(jnp.zeros((*stack, inputs, config.rank)))
            module.lora_b = nnx.LoRAParam(jnp.zeros((*stack, config.rank, outputs)))
            module.lora_scale = config.scale


@functools.lru_cache(maxsize=16)
def build_adapted(
    module: type[nnx.Module], config: Any, lora: LoraConfig
) -> tuple[nnx.GraphDef, Params]:
    """Returns the graph definition of a model with adapters, and the abstract adapters.

    Args:
      module, config: see `params.build`, whose tree is the base.
      lora: the adapters.

    Returns:
      A graph definition for `apply`, whose parameters are `combine(base, adapters)`, and the shapes
      of the adapters.

    Raises:
      InputError: a target matches no layer, or the rank is larger than a layer's full rank.
    """
    graphdef, abstract = build_with(module, config, lambda model: _add_adapters(model, lora))
    return graphdef, adapters_of(abstract)


def adapters_of(tree: Params) -> Params:
    """Returns the adapters in a tree that holds the base and the adapters."""
    return from_leaves({p: a for p, a in leaves(tree) if p.endswith((".lora_a", ".lora_b"))})


def combine(base: Params, adapters: Params) -> Params:
    """Joins the two trees for a forward pass, without a copy of any array."""
    out = dict(base)
    for name, value in adapters.items():
        out[name] = combine(base.get(name, {}), value) if isinstance(value, dict) else value
    return out


def init_adapters(abstract: Params, key: Key[Array, ""]) -> Params:
    """Fresh float32 adapters: A uniform in +-in^-1/2, B zero, so that nothing changes at first.

    A is uniform between -in^-1/2 and in^-1/2. This is PyTorch's `kaiming_uniform_` with
    a = sqrt(5), which PEFT uses for A.
    """
    flat = {}
    for i, (path, leaf) in enumerate(leaves(abstract)):
        if path.endswith("lora_b"):
            flat[path] = jnp.zeros(leaf.shape, jnp.float32)
        else:
            bound = leaf.shape[-2] ** -0.5
            flat[path] = jax.random.uniform(
                jax.random.fold_in(key, i), leaf.shape, jnp.float32, -bound, bound
            )
    return from_leaves(flat)


def merge_lora(params: Params, adapters: Params, scale: float) -> Params:
    """Returns `params` in which every kernel W with adapters is replaced by W + scale A B.

    The sum is computed in float32 and then rounded to W's dtype.

    Args:
      params: the base; its layers are stacked or separate, see `core.stack.Layers`.
      adapters: adapters of these layers, stacked.
      scale: `LoraConfig.scale`.

    Raises:
      InputError: the base does not have a layer of the adapters, or its size differs.
    """
    flat, factors = dict(leaves(params)), dict(leaves(adapters))
    for path, a in factors.items():
        layer, _, name = path.rpartition(".")
        if name != "lora_a":
            continue
        kernel, b = flat.get(f"{layer}.kernel"), factors[f"{layer}.lora_b"]
        if kernel is None:
            raise InputError(f"the adapter has {layer}, which this model has not")
        product = (*a.shape[:-1], b.shape[-1])
        is_separate = isinstance(kernel, tuple)
        shape = (len(kernel), *kernel[0].shape) if is_separate else kernel.shape
        if product != shape:
            raise InputError(f"the adapter of {layer} is for {product}, not {shape}")
        if is_separate:
            merged = tuple(_merged(*parts, scale) for parts in zip(kernel, a, b, strict=True))
        else:
            merged = _merged(kernel, a, b, scale)
        flat[f"{layer}.kernel"] = merged
    return from_leaves(flat)


@jax.jit
def _merged(
    kernel: Float[Array, "*rest C C_out"],
    a: Float[Array, "*rest C R"],
    b: Float[Array, "*rest R C_out"],
    scale: float | Float[Array, ""],
) -> Float[Array, "*rest C C_out"]:
    # rounded once: at the default precision of an accelerator the product would be off by 2^-8
    product = jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
