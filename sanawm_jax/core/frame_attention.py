"""Softmax attention through which one latent frame sees others, and attention to the text.

See `core.frames` for chunks, meshes and streams. On a mesh whose `context` axis shares the frames
out, attention gathers the keys and values of all ranks, and the queries stay where they are.
Axis letters: B batch, F latent frames, P tokens per frame, N heads, D head size, L text tokens,
E latent frames that a cache has room for.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sanawm_jax.core import teacher_forcing
from sanawm_jax.core.attention import attention, attention_to_both
from sanawm_jax.core.frames import FrameLayout, check_carry
from sanawm_jax.core.sharding import CONTEXT, per_rank

_HEADS = "B F P N D"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of earlier frames of one softmax layer; the valid frames come first."""

    k: Float[Array, "*rest E P N D"]  # a stack of layers has more axes in front
    v: Float[Array, "*rest E P N D"]


def frame_attention(
    q: Float[Array, "B F P N D"],
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N D"],
    layout: FrameLayout,
    *,
    key_mask: Bool[Array, "B F"] | None = None,
    scale: float | None = None,
    cache: KeyValueCache | None = None,
    cached: Int[Array, ""] | None = None,
) -> Float[Array, "B F P N D"]:
    """Softmax attention of every chunk to the keys before its end.

    Args:
      q, k, v: heads of the tokens of the padded frames.
      key_mask: false hides a frame's keys.
      scale: factor of the logits; D^-1/2 by default.
      cache: keys and values of earlier chunks, which all queries see as well.
      cached: how many of the cache's frames are valid, at least 1.

    Returns:
      The mixed values.
    """
    if cache is not None and cached is not None:
        check_carry(layout)
        names = (*[_HEADS] * 3, "B E P N D", "")
        attend = per_rank(functools.partial(_attend_cached, scale=scale), names, _HEADS)
        return attend(q, k, v, cache, cached)
    if layout.forced:
        return teacher_forcing.frame_attention(q, k, v, layout.history(), scale)
    run = _attend_gathered if layout.shards > 1 else _attend_chunks
    attend = per_rank(
        functools.partial(run, layout=layout, scale=scale), (*[_HEADS] * 3, "B F"), _HEADS
    )
    return attend(q, k, v, key_mask)


def text_attention(
    q: Float[Array, "B F P N D"],
    k: Float[Array, "B L N D"],
    v: Float[Array, "B L N D"],
    text_mask: Bool[Array, "B L"],
) -> Float[Array, "B F P N D"]:
    """Softmax attention of every token to a text; ranks of a mesh each run their own frames.

    Args:
      q: queries, F padded.
      text_mask: false hides a token of the text.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        frames = q.shape[1]
        y = attention(rearrange(q, "B F P N D -> B (F P) N D"), k, v, key_mask=mask)
        return rearrange(y, "B (F P) N D -> B F P N D", F=frames)

    names = (_HEADS, "B L N D", "B L N D", "B L")
    return per_rank(attend, names, _HEADS)(q, k, v, text_mask)


def _attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KeyValueCache,
    cached: jax.Array,
    *,
    scale: float | None,
) -> jax.Array:
    frames, tokens = q.shape[1:3]
    q, k, v, old_k, old_v = (
        rearrange(a, "B F P N D -> B (F P) N D") for a in (q, k, v, cache.k, cache.v)
    )
    count = jnp.broadcast_to(cached * tokens, q.shape[:1]).astype(jnp.int32)
    y = attention_to_both(q, (k, v), (old_k, old_v), key_count=count, scale=scale)
    return rearrange(y, "B (F P) N D -> B F P N D", F=frames)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array | None, **options: Any
) -> jax.Array:
    frames, tokens = q.shape[1:3]
    q, k, v = (rearrange(a, "B F P N D -> B (F P) N D") for a in (q, k, v))
    if key_mask is not None:
        key_mask = jnp.repeat(key_mask, tokens, axis=1)  # B T
    y = attention(q, k, v, key_mask=key_mask, **options)
    return rearrange(y, "B (F P) N D -> B F P N D", F=frames)


def _attend_chunks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    *,
    layout: FrameLayout,
    scale: float | None,
) -> jax.Array:
    # keys are sliced, not hidden: an explicit mask would cost the fused kernels
    def seen(a: jax.Array, chunk: int) -> jax.Array:
        runs = [a[:, start:end] for start, end in layout.key_frames(chunk)]
        return runs[0] if len(runs) == 1 else jnp.concatenate(runs, 1)

    parts = [
        _attend(
            q[:, start:end],
            seen(k, i),
            seen(v, i),
            None if key_mask is None else seen(key_mask, i),
            scale=scale,
        )
        for i, (start, end) in enumerate(layout.chunks)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def _attend_gathered(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: jax.Array | None,
    *,
    layout: FrameLayout,
    scale: float | None,
) -> jax.Array:
    """One rank's queries; keys and values come from all ranks, the padding is cut off."""

    def whole(a: jax.Array) -> jax.Array:
        return lax.all_gather(a, CONTEXT, axis=1, tiled=True)[:, : layout.frames]

    k, v = whole(k), whole(v)
    key_mask = None if key_mask is None else whole(key_mask)
    if len(layout.starts) == 1:
        return _attend(q, k, v, key_mask, scale=scale)

    # ranks run one program, so what a frame sees is a count and not a slice
    def one_frame(frame: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, end = frame
        count = jnp.broadcast_to(end * q.shape[2], q.shape[:1]).astype(jnp.int32)
        return _attend(queries[:, None], k, v, key_mask, scale=scale, key_count=count)[:, 0]

    frames = (jnp.moveaxis(q, 1, 0), layout.local(layout.ends()))
    return jnp.moveaxis(lax.map(one_frame, frames), 0, 1)
