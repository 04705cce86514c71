"""Refines stage-1 latents: three Euler steps, block by block with a window, or all at once.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens, C text width, Y layers, N heads, D head size.
Reference: diffusers `SanaWMLTX2Refiner.__call__`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key, Shaped

from sanawm_jax.core.params import Params, apply
from sanawm_jax.memory.streaming import Runner, call
from sanawm_jax.refiner.kv_window import KeyValue, KVWindow, append_block, open_window
from sanawm_jax.refiner.model import without_text_layers
from sanawm_jax.refiner.rope import VideoRope, frame_window
from sanawm_jax.sampling.schedule import add_noise, euler_rollout

# noise levels of the distilled release, 3 steps
SIGMAS = (0.909375, 0.725, 0.421875, 0.0)


class RefinerText(NamedTuple):
    """The prompt as the transformer reads it."""

    embeddings: Float[Array, "B L C"]
    mask: Shaped[Array, "B L"] | None = None  # None shows all
    keys: KeyValue | None = None  # Y B L N D, `read_text`


def read_text(
    graphdef: nnx.GraphDef, params: Params, text: RefinerText, *, dtype: Any, run: Runner = call
) -> tuple[Params, RefinerText]:
    """The prompt with its keys and values, and parameters without the layers that make them.

    A clip reads its text once. Where the timestep modulates the text, every pass reads it, and both
    are returned as they are.

    Args:
      dtype: compute dtype, and that of the keys and values.
      run: see `refine`.
    """
    keys = text.keys
    if keys is None:
        keys = run(_text_keys, graphdef, params, text.embeddings, dtype=dtype)
    if keys is None:
        return params, text
    return without_text_layers(params), text._replace(keys=keys)


@jax.jit(static_argnames=("graphdef", "dtype"))
def _text_keys(
    graphdef: nnx.GraphDef, params: Params, embeddings: jax.Array, *, dtype: Any
) -> KeyValue | None:
    return apply(graphdef, params, embeddings.astype(dtype), method="read_text")


def block_noise(
    key: Key[Array, ""], first: int | Int[Array, ""], frames: int, shape: tuple[int, ...]
) -> Float32[Array, "B F H W c"]:
    """Draws standard normal noise of the frames first..first+F-1.

    A frame's noise depends on its position alone, so any cut into blocks draws the same.

    Args:
      shape: (B, H, W, c).
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(frames))
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.normal(k, shape))(keys), 0, 1)


@jax.jit(static_argnames=("frames", "shape"))
def frame_noise(
    seed: Any, first: Any, frames: int, shape: tuple[int, ...]
) -> Float32[Array, "B F H W c"]:
    """`block_noise` of a seed, in one program for every block of one length."""
    return block_noise(jax.random.key(seed), first, frames, shape)


@jax.jit(static_argnames=("graphdef", "history_slots", "dtype"))
def capture_sink(
    graphdef: nnx.GraphDef,
    params: Params,
    sink: Float[Array, "B F H W c"],
    text: RefinerText,
    rope: VideoRope,
    *,
    history_slots: int,
    dtype: Any,
) -> KVWindow:
    """Returns an empty window whose sink holds raw stage-1 frames, read at noise level 0.

    Args:
      rope: tables of the clip from frame 0 on.
      history_slots: refined frames that the window keeps, `window frames - sink frames`.
      dtype: compute dtype, and that of the keys and values.
    """
    here = frame_window(rope, 0, sink.shape[1])
    _, captured = apply(
        graphdef,
        params,
        sink.astype(dtype),
        jnp.zeros((len(sink), 1, 1)),
        text.embeddings,
        here,
        text_mask=text.mask,
        text_keys=text.keys,
        capture=True,
    )
    return open_window(
        captured,
        lambda k: apply(graphdef, params, k, here, method="turn"),
        history_slots=history_slots,
    )


@jax.jit(static_argnames=("graphdef", "dtype"), donate_argnames=("window",))
def refine_block(
    graphdef: nnx.GraphDef,
    params: Params,
    window: KVWindow,
    clean: Float[Array, "B F H W c"],
    noise: Float[Array, "B F H W c"],
    text: RefinerText,
    rope: VideoRope,
    sigmas: Float[Array, "_"],
    *,
    dtype: Any,
) -> tuple[Float32[Array, "B F H W c"], KVWindow]:
    """Refines the frames that follow the window, and moves the window past them.

    One program serves all blocks of one length, because the frames' position and the number of
    frames in the window are numbers in the window's state.

    Args:
      window: donated.
      clean: stage-1 latents; F is at most the window's history slots.
      noise: standard normal.
      rope: tables of the clip from frame 0 on, at least to this block's end.
      sigmas: falling noise levels down to 0, one more than there are steps.
      dtype: compute dtype; the latents stay float32 between steps.

    Returns:
      The refined latents, and the window for the next block.
    """
    scale = apply(graphdef, params, method="timestep_scale")
    frames = clean.shape[1]
    here = frame_window(rope, window.block_start, frames)

    def forward(x: jax.Array, sigma: Any, *, capture: bool = False) -> tuple[jax.Array, Any]:
        return apply(
            graphdef,
            params,
            x.astype(dtype),
            jnp.full((len(x), 1, 1), sigma * scale),
            text.embeddings,
            here,
            text_mask=text.mask,
            text_keys=text.keys,
            window=window,
            capture=capture,
        )

    start = add_noise(clean, noise, sigmas[0])
    x = euler_rollout(lambda x, sigma: forward(x, sigma)[0], start, sigmas[:-1], sigmas[1:])
    # The refined frames' keys and values come from one more pass at noise level 0. It is not
    # part of the loop, where every step would have to hold a block's keys in all layers.
    _, written = forward(x, 0.0, capture=True)

    def turn(k: jax.Array, start: jax.Array) -> jax.Array:
        return apply(
            graphdef, params, k, frame_window(rope, start, window.sink_frames), method="turn"
        )

    return x, append_block(window, written, frames, turn)


@jax.jit(static_argnames=("graphdef", "sink_frames", "dtype"))
def refine_at_once(
    graphdef: nnx.GraphDef,
    params: Params,
    clean: Float[Array, "B F H W c"],
    noise: Float[Array, "B F-{sink_frames} H W c"],
    text: RefinerText,
    rope: VideoRope,
    sigmas: Float[Array, "_"],
    *,
    sink_frames: int,
    dtype: Any,
) -> Float32[Array, "B F-{sink_frames} H W c"]:
    """Refines a whole clip as one block: the sink sees itself, the rest sees everything.

    Args:
      clean: stage-1 latents, with the sink.
      noise: standard normal, without the sink.

    Returns:
      The refined latents without the sink.
    """
    scale = apply(graphdef, params, method="timestep_scale")
    sink = clean[:, :sink_frames].astype(jnp.float32)
    is_sink = (jnp.arange(clean.shape[1]) < sink_frames)[None, :, None]

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        timesteps = jnp.where(is_sink, 0.0, sigma * scale)
        out, _ = apply(
            graphdef,
            params,
            jnp.concatenate([sink, x], 1).astype(dtype),
            jnp.broadcast_to(timesteps, (len(x), *timesteps.shape[1:])),
            text.embeddings,
            rope,
            text_mask=text.mask,
            text_keys=text.keys,
            sink_frames=sink_frames,
        )
        return out[:, sink_frames:]

    start = add_noise(clean[:, sink_frames:], noise, sigmas[0])
    return euler_rollout(velocity, start, sigmas[:-1], sigmas[1:])


def blocks(frames: int, sink_frames: int, block_frames: int) -> Iterator[tuple[int, int]]:
    """First and one-past-last frame of every block; the last may be short."""
    for first in range(sink_frames, frames, block_frames):
        yield first, min(first + block_frames, frames)


def refine(
    graphdef: nnx.GraphDef,
    params: Params,
    latents: Float[Array, "B F H W c"],
    text: RefinerText,
    rope: VideoRope,
    *,
    noise: Float[Array, "B F-{sink_frames} H W c"] | None = None,
    key: Key[Array, ""] | None = None,
    sink_frames: int = 1,
    block_frames: int = 3,
    window_frames: int = 11,
    sigmas: tuple[float, ...] = SIGMAS,
    dtype: Any,
    progress: bool = True,
    run: Runner = call,
) -> Float32[Array, "B F H W c"]:
    """Refines a clip.

    Args:
      graphdef, params: the `Refiner`.
      latents: of stage 1, normalised.
      text: the prompt, read here if `read_text` has not.
      rope: `rope.video_rope` of these frames and this grid.
      noise: of the frames after the sink; drawn from `key` if None.
      sink_frames: the first frames, kept as they are.
      block_frames: frames of a block; 0 refines the clip at once, without a window.
      window_frames: frames that a block attends to in addition to its own: sink and history.
      sigmas: falling noise levels down to 0.
      dtype: compute dtype of the network.
      progress: show a progress bar.
      run: how the compiled functions are called, see `memory.streaming`.

    Returns:
      The refined latents; the sink frames are the given ones.
    """
    from tqdm import tqdm

    latents = latents.astype(jnp.float32)
    frames = latents.shape[1]
    levels = jnp.asarray(np.array(sigmas, np.float32))
    params, text = read_text(graphdef, params, text, dtype=dtype, run=run)
    shape = (latents.shape[0], *latents.shape[2:])

    def noise_of(first: int, last: int) -> jax.Array:
        if noise is not None:
            return noise[:, first - sink_frames : last - sink_frames]
        return block_noise(jax.random.key(42) if key is None else key, first, last - first, shape)

    out = [latents[:, :sink_frames]]
    if block_frames == 0:
        out.append(
            run(
                refine_at_once,
                graphdef,
                params,
                latents,
                noise_of(sink_frames, frames),
                text,
                rope,
                levels,
                sink_frames=sink_frames,
                dtype=dtype,
            )
        )
        return jnp.concatenate(out, 1)
    window = run(
        capture_sink,
        graphdef,
        params,
        latents[:, :sink_frames],
        text,
        rope,
        history_slots=window_frames - sink_frames,
        dtype=dtype,
    )
    cuts = list(blocks(frames, sink_frames, block_frames))
    for first, last in tqdm(cuts, desc="refining", unit="block", disable=not progress):
        refined, window = run(
            refine_block,
            graphdef,
            params,
            window,
            latents[:, first:last],
            noise_of(first, last),
            text,
            rope,
            levels,
            dtype=dtype,
        )
        out.append(refined.block_until_ready())  # the bar shows finished blocks, not queued ones
    return jnp.concatenate(out, 1)
