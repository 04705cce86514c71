"""The refiner as a stream: it refines a block as soon as the frames of the block have arrived.

Any cut of a clip into calls gives the latents of `sampler.refine`, which has the whole clip.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from sanawm_jax.core.params import Params
from sanawm_jax.refiner.config import RefinerConfig
from sanawm_jax.refiner.kv_window import KVWindow
from sanawm_jax.refiner.rope import VideoRope, video_rope
from sanawm_jax.refiner.sampler import RefinerText, capture_sink, frame_noise, refine_block

_TABLE_FRAMES = 1024  # frames of the first rotary table; a longer stream doubles it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RefinerState:
    """What a refiner carries from one call to the next.

    Attributes:
      window: keys and values of earlier frames; None before the sink has arrived.
      waiting: latents that are not a whole block yet, or not the whole sink.
      frames: latent frames that were refined or are the sink.
    """

    window: KVWindow | None
    waiting: Float32[Array, "B F H W c"]
    frames: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class RefinerStream:
    """Refines a stream block by block.

    Attributes:
      graphdef, params: the `Refiner`; the layers that read a text may be absent.
      config: its configuration.
      text: the prompt with its keys, `sampler.read_text`; a new one acts from the next block on.
      sigmas: falling noise levels down to 0.
      fps: pixel frames per second, from which the time positions are computed.
      sink_frames, block_frames, window_frames: see `sampler.refine`.
      seed: of the noise.
      noise: (B, F, H, W, c) of the frames after the sink, which replaces the seed's.
      dtype: compute dtype of the network.
    """

    graphdef: nnx.GraphDef
    params: Params
    config: RefinerConfig
    text: RefinerText
    sigmas: tuple[float, ...]
    fps: float
    sink_frames: int
    block_frames: int
    window_frames: int
    seed: int
    dtype: Any
    noise: Float[Array, "B F H W c"] | None = None

    def __post_init__(self) -> None:
        self._levels = jnp.asarray(np.array(self.sigmas, np.float32))
        self._rope: Any = None  # a `VideoRope`

    def step(
        self, latents: Float[Array, "B F H W c"], state: RefinerState | None = None
    ) -> tuple[Float32[Array, "B F_out H W c"], RefinerState]:
        """Refines all whole blocks that these latents complete.

        Args:
          latents: of stage 1, those that follow the state.
          state: donated; None at the start of a stream, whose first frames are the sink.

        Returns:
          The latents that are final now, at the start the sink as it was given, and the state.
        """
        latents = latents.astype(jnp.float32)
        if state is None:
            state = RefinerState(None, latents[:, :0], 0)
        return self._run(latents, state, self.block_frames)

    def finish(self, state: RefinerState) -> tuple[Float32[Array, "B F_out H W c"], RefinerState]:
        """Refines the frames that wait, as a last and shorter block."""
        return self._run(state.waiting[:, :0], state, max(state.waiting.shape[1], 1))

    def _run(
        self, latents: jax.Array, state: RefinerState, block_frames: int
    ) -> tuple[jax.Array, RefinerState]:
        window, done = state.window, state.frames
        if state.waiting.shape[1]:
            latents = jnp.concatenate([state.waiting, latents], 1)
        at, final = 0, []
        if window is None and latents.shape[1] >= self.sink_frames:
            final.append(latents[:, : self.sink_frames])
            window = capture_sink(
                self.graphdef,
                self.params,
                final[0],
                self.text,
                self._tables(latents, self.sink_frames),
                history_slots=self.window_frames - self.sink_frames,
                dtype=self.dtype,
            )
            at = done = self.sink_frames
        while window is not None and latents.shape[1] - at >= block_frames:
            clean = latents[:, at : at + block_frames]
            refined, window = refine_block(
                self.graphdef,
                self.params,
                window,
                clean,
                self._noise(done, clean),
                self.text,
                self._tables(latents, done + block_frames),
                self._levels,
                dtype=self.dtype,
            )
            final.append(refined)
            at, done = at + block_frames, done + block_frames
        out = final[0] if len(final) == 1 else jnp.concatenate([latents[:, :0], *final], 1)
        return out, RefinerState(window, latents[:, at:], done)

    def _noise(self, first: int, clean: jax.Array) -> jax.Array:
        batch, frames, *grid = clean.shape
        if self.noise is not None:
            return self.noise[:, first - self.sink_frames :][:, :frames]
        return frame_noise(np.uint32(self.seed % 2**32), np.int32(first), frames, (batch, *grid))

    def _tables(self, latents: jax.Array, frames: int) -> VideoRope:
        """Rotary tables of at least this many frames."""
        if self._rope is None or len(self._rope.frames) < frames:
            count = _TABLE_FRAMES
            while count < frames:
                count *= 2
            height, width = latents.shape[2:4]
            rope = video_rope(self.config, count, height, width, self.fps)
            with jax.ensure_compile_time_eval():  # `step` may run while it is traced for its shapes
                self._rope = jax.device_put(rope)
        return self._rope
