"""Teacher forcing: all frames of a clip learn in one pass to continue the frames before them.

A sequence holds a clip twice. The first half, the history, is what a stream would have finished. A
frame of the second half is noisy, and sees itself and the history before it, but no other noisy
frame. So one pass computes what a stream computes in one call per frame, from states that its
earlier calls left. Chunks have one frame. The functions are the teacher-forced forms of those of
`core.frames` with the same names.

Axis letters: B batch, F frames of the sequence (twice those of the clip), P tokens per frame, N
heads, D head size, V value size of the recurrence, C channels, E frames of the history that a frame
may see.
Source: teacher forcing of an autoregressive teacher as in arXiv 2602.02214.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from kernels_pallas import gdn
from kernels_pallas.gdn.reference import einsum
from sanawm_jax.core.attention import attention


def neighbours(x: Float[Array, "B F P C"], reach: int) -> list[Float[Array, "B F P C"]]:
    """What a convolution over frames sees at the offsets -reach, ..., reach."""
    history = x[:, : x.shape[1] // 2]
    padded = jnp.pad(history, ((0, 0), (reach, 0), (0, 0), (0, 0)))
    past = [padded[:, i : i + history.shape[1]] for i in range(reach)]
    future = [jnp.zeros_like(x)] * reach  # a chunk of one frame has none
    return [*(jnp.concatenate([a, a], 1) for a in past), x, *future]


def recurrent_states(
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N V"] | None,
    beta: Float[Array, "B F P N"],
    decay: Float[Array, "B F N"],
) -> Float[Array, "B F N _ D"]:
    """The states that every frame reads, float32."""
    if v is None:
        w, u = gdn.normaliser_transitions(k, beta, decay)
    else:
        w, u = gdn.frame_transitions(k, v, beta, decay)
    clip = k.shape[1] // 2
    history, _ = gdn.scan_states(gdn.Transition(w[:, :clip], u[:, :clip]))
    before = jnp.pad(history[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    # one step of the recurrence from the state before the frame
    step = einsum("bfnvd,bfnde->bfnve", before, w[:, clip:])
    return jnp.concatenate([history, step + u[:, clip:]], 1)


def frame_attention(
    q: Float[Array, "B F P N D"],
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N D"],
    seen: Sequence[Sequence[int]],
    scale: float | None,
) -> Float[Array, "B F P N D"]:
    """Softmax attention of every frame to itself and to the history that it sees.

    Every frame is a row of a batch, with its own keys first and hidden ones last, so that counts of
    keys replace the mask that fused kernels do not take.

    Args:
      seen: for each frame of the clip, the earlier frames that it sees.
      scale: factor of the logits; D^-1/2 by default.
    """
    batch, frames, tokens = q.shape[:3]
    clip, room = frames // 2, max(map(len, seen))
    choice = np.zeros((frames, room, clip), np.float32)  # frame, place, frame of the history
    for frame in range(frames):
        for at, source in enumerate(seen[frame % clip]):
            choice[frame, at, source] = 1.0
    counts = tokens * (1 + choice.sum((1, 2)).astype(np.int32))
    chosen = jnp.asarray(choice, q.dtype)

    def keys(a: jax.Array) -> jax.Array:
        # a product with ones and zeros copies exactly, and its gradient is no scatter
        past = jnp.einsum("F E f, B f P N D -> B F E P N D", chosen, a[:, :clip])
        return rearrange(
            jnp.concatenate([a[:, :, None], past], 2), "B F E P N D -> (B F) (E P) N D"
        )

    y = attention(
        rearrange(q, "B F P N D -> (B F) P N D"),
        keys(k),
        keys(v),
        key_count=jnp.tile(jnp.asarray(counts, jnp.int32), batch),
        scale=scale,
    )
    return rearrange(y, "(B F) P N D -> B F P N D", F=frames)
