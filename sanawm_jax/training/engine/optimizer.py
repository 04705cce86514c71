"""AdamW or Muon with global-norm clipping, and a learning rate that may follow the clock."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sanawm_jax.core.params import Params, from_leaves, leaves
from sanawm_jax.core.stack import stacked_axes
from sanawm_jax.runtime.errors import InputError

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")
MOMENTS_DTYPES = ("float32", "bfloat16")


def decay_mask(params: Params) -> Params:
    """True on kernels; biases, norms, tables, gates and statistics are not decayed."""
    return from_leaves({path: path.endswith("kernel") for path, _ in leaves(params)})


def matrix_axes(params: Params) -> Any:
    """Which axes of a leaf make the matrix that Muon orthogonalises; None leaves it to AdamW.

    A kernel maps all its axes but the last to the last one. The axes along which layers are
    stacked do not belong to the matrix: each layer is orthogonalised alone. Depthwise kernels are
    not matrices.
    """
    from optax.contrib import MuonDimensionNumbers

    def one(path: str, leaf: Any) -> MuonDimensionNumbers | None:
        # optax also asks about trees from which AdamW's leaves are taken out
        if not path.endswith("kernel") or not hasattr(leaf, "shape") or leaf.shape[-2] == 1:
            return None
        inputs = range(stacked_axes(path), leaf.ndim - 1)
        return MuonDimensionNumbers(tuple(inputs), (leaf.ndim - 1,))

    return from_leaves({path: one(path, leaf) for path, leaf in leaves(params)})


def make_optimizer(
    *,
    name: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    moments_dtype: str = "float32",
) -> optax.GradientTransformation:
    """An optimizer at learning rate 1; the train step scales its updates by `learning_rate`.

    Args:
      betas: with betas[0] = 0 AdamW's first moment is the gradient itself and is not kept.
      name: adamw; or muon, which orthogonalises the updates of matrices (arXiv 2502.16982, their
        size matched to AdamW's) and leaves all else to AdamW.
      moments_dtype: of the first moments in memory and in checkpoints. AdamW's second moments stay
        float32: a step changes them by 1 - betas[1] of their value, less than bfloat16 resolves.

    Raises:
      InputError: unknown name or dtype.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer.name={name!r}; use one of {', '.join(OPTIMIZERS)}")
    if moments_dtype not in MOMENTS_DTYPES:
        raise InputError(
            f"optimizer.moments_dtype={moments_dtype!r}; use one of {', '.join(MOMENTS_DTYPES)}"
        )
    if name == "muon":
        from optax.contrib import muon

        rule = muon(
            1.0,
            adam_b1=betas[0],
            adam_b2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            weight_decay_mask=decay_mask,
            muon_weight_dimension_numbers=matrix_axes,  # pyright: ignore[reportArgumentType]
            consistent_rms=0.2,
            mu_dtype=moments_dtype,
        )
    elif betas[0] == 0.0:
        rule = optax.chain(
            optax.scale_by_rms(betas[1], eps, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(1.0),
        )
    else:
        rule = optax.adamw(
            1.0,
            *betas,
            eps=eps,
            mu_dtype=moments_dtype,
            weight_decay=weight_decay,
            mask=decay_mask,
        )
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule)


def learning_rate(
    step: jax.Array,
    wall_fraction: jax.Array,
    *,
    peak: float,
    warmup_steps: int,
    num_steps: int,
    schedule: str = "cosine",
    final_fraction: float = 0.0,
) -> jax.Array:
    """Linear warm-up, then constant or cosine over the run.

    Args:
      step: () updates done.
      wall_fraction: () share of the time limit that is used up, 0 without a limit. The run is as
        far as the larger of this and step / num_steps.
      peak: rate after warm-up.
      final_fraction: where the cosine ends, as a share of the peak.

    Raises:
      InputError: unknown schedule, or a peak below 0.
    """
    if not 0 <= peak < float("inf"):
        raise InputError(f"optimizer.learning_rate={peak:g} must be a positive number")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}; use one of {', '.join(SCHEDULES)}")
    warm = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    if schedule == "constant":
        return peak * warm
    progress = jnp.clip(jnp.maximum(step / num_steps, wall_fraction), 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return peak * warm * (final_fraction + (1.0 - final_fraction) * cosine)


def ema_decay(step: jax.Array, decay: float) -> jax.Array:
    """Decay of the moving average, low at first so that the initial weights fade quickly."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
