"""Latents of clips that the accelerator renders and encodes between training steps.

Every length of clips has a pool of rows in the memory of each device. New clips replace the oldest
rows, so a training sees endless scenes, each for a while.

Axis letters: R devices, n rows of a pool on one device, f pixel frames, F latent frames, H W latent
rows and columns, c latent channels, L text tokens, C text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sanawm_jax.core.params import Params, apply, build, cast
from sanawm_jax.core.sharding import logical_spec
from sanawm_jax.data.latent_cache import TextEncoder, to_signed
from sanawm_jax.data.views import ALL_VIEWS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.clip_plans import STRIDE, Plan, Planner
from sanawm_jax.small_world.scenery.pool import clip_renderer
from sanawm_jax.small_world.scenery.scene import stack_scenes
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE

VIEWS = len(ALL_VIEWS)


def unpacked(packed: jax.Array) -> jax.Array:
    """(..., W * 3 / 4) uint32 -> (..., W, 3) uint8."""
    pixels = jax.lax.bitcast_convert_type(packed, jnp.uint8)
    return pixels.reshape(*packed.shape[:-1], -1, 3)


class ClipEncoder:
    """Plans to latents: one program renders clips of every length, in segments of one length.

    Args:
      mesh: whose devices share the clips.
      vae: configuration and weights of the autoencoder.
      text: captions -> states (B, L, C) and mask (B, L).
      render: segments per call of the renderer.
      segment: pixel frames of a segment, 8k + 1.
      size: height and width in pixels.
    """

    def __init__(
        self,
        mesh: Mesh,
        vae: tuple[VAEConfig, Params],
        text: TextEncoder,
        *,
        render: int,
        segment: int,
        size: tuple[int, int],
    ):
        self.mesh = mesh
        self._render, self._segment = render, segment
        self._text = text
        self._renderer = clip_renderer(mesh, *size)
        dtype = compute_dtype("auto")
        self._vae = jax.device_put(cast(vae[1], dtype), NamedSharding(mesh, P()))
        graphdef, _ = build(VideoVAE, vae[0])
        rows = logical_spec("B")

        def views(params: Params, packed: jax.Array, frames: int) -> jax.Array:
            # packed (1, segments, f, H, W') of one device -> (1, clips, views, F, H, W, c)
            per_clip = -(-frames // segment)
            clips = packed.reshape(-1, per_clip * segment, *packed.shape[3:])[:, :frames]
            video = to_signed(unpacked(clips)).astype(dtype)
            seen = []
            for view in ALL_VIEWS:
                shown = video[:, :, :, ::-1] if view.mirror else video
                shown = shown[:, ::-1] if view.reverse else shown
                seen.append(apply(graphdef, params, shown, method="encode_normalised"))
            return jnp.stack(seen, 1)[None].astype(dtype)

        def encode(params: Params, packed: jax.Array, frames: int) -> jax.Array:
            def local(params: Params, packed: jax.Array) -> jax.Array:
                return views(params, packed, frames)

            shared = jax.shard_map(
                local, mesh=mesh, in_specs=(P(), rows), out_specs=rows, check_vma=False
            )
            return shared(params, packed)

        self._encode: Callable[..., jax.Array] = jax.jit(encode, static_argnames="frames")

    def clips(self, frames: int) -> int:
        """Clips of this length per call.

        Raises:
          InputError: the devices cannot share them.
        """
        per_clip = -(-frames // self._segment)
        count = self._render // per_clip
        if count * per_clip != self._render or count % self.mesh.size:
            raise InputError(
                f"--render={self._render} must be a multiple of {per_clip * self.mesh.size}, for "
                f"clips of {frames} frames in segments of {self._segment}"
            )
        return count

    def __call__(self, plans: Sequence[Plan], frames: int) -> tuple[dict[str, Any], jax.Array]:
        """Renders and encodes `clips(frames)` plans.

        Returns:
          latents (R, clips / R, views, F, H, W, c), camera, plucker, text and text_mask
          (R, clips / R, views, ...); and the packed video of the segments.
        """
        ranks, per_clip = self.mesh.size, -(-frames // self._segment)
        last = np.minimum(np.arange(per_clip * self._segment), frames - 1)
        poses = np.stack([plan.c2w[last] for plan in plans])
        poses = poses.reshape(-1, self._segment, 4, 4)
        scenes = stack_scenes([plan.scene for plan in plans for _ in range(per_clip)])
        intrinsics = np.repeat(np.stack([plan.intrinsics for plan in plans]), per_clip, 0)
        video = self._renderer(scenes, poses, intrinsics)
        latents = self._encode(self._vae, video, frames=frames)
        text, mask = self._text([plan.caption for plan in plans])
        rest = {
            "camera": np.stack([plan.camera for plan in plans]),
            "plucker": np.stack([plan.plucker for plan in plans]),
            # these stay on the device: reading them would wait for training steps under way
            "text": jnp.repeat(text[:, None], VIEWS, 1),
            "text_mask": jnp.repeat(mask[:, None], VIEWS, 1),
        }
        rest = {n: a.reshape(ranks, -1, *a.shape[1:]) for n, a in rest.items()}
        return {"latents": latents, **rest}, video


class LatentPool:
    """Rows of one length on the devices.

    Attributes:
      rows: arrays (R, n, ...) by name: latents, camera, plucker, text, text_mask.
      filled: rows that hold a clip.
      added: rows that were ever written.

    Args:
      shapes: of one clip's arrays, without the axes R and n.
      capacity: rows n of each device, rounded down to whole calls of the encoder.
      step: rows that each call of the encoder adds on each device.
    """

    def __init__(self, mesh: Mesh, shapes: dict[str, Any], capacity: int, step: int):
        rows = NamedSharding(mesh, logical_spec("B"))
        self.capacity = max(capacity // step, 1) * step
        self.filled = self.added = 0
        self._step = step
        self.rows = {
            name: jnp.zeros((mesh.size, self.capacity, *s.shape), s.dtype, device=rows)
            for name, s in shapes.items()
        }
        self._rows = rows

        def write(whole: Any, part: Any, at: jax.Array) -> Any:
            def one(a: jax.Array, b: jax.Array) -> jax.Array:
                b = b.reshape(b.shape[0], -1, *b.shape[3:]).astype(a.dtype)
                return jax.lax.dynamic_update_slice(a, b, (0, at, *[0] * (a.ndim - 2)))

            return jax.tree.map(one, whole, part)

        spec = logical_spec("B")
        shared = jax.shard_map(write, mesh=mesh, in_specs=(spec, spec, P()), out_specs=spec)
        self._write = jax.jit(shared, donate_argnums=0)

    def add(self, clips: dict[str, Any]) -> None:
        """Writes what a call of `ClipEncoder` returned over the oldest rows."""
        part = {name: jax.device_put(a, self._rows) for name, a in clips.items()}
        self.rows = self._write(self.rows, part, self.added % self.capacity)
        self.added += self._step
        self.filled = min(self.added, self.capacity)


class Clips:
    """The pools of all lengths, and where their clips come from.

    Args:
      encoder, planner: what makes clips.
      lengths: pixel frames of the clips, the shortest first.
      shapes: length -> arrays of one clip, see `row_shapes`.
      capacity: rows of the shortest clips on each device; pools of other lengths need as much
        memory.

    Attributes:
      seen: clips made so far.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        planner: Planner,
        lengths: Sequence[int],
        shapes: Callable[[int], dict[str, jax.ShapeDtypeStruct]],
        capacity: int,
    ):
        self._encoder, self._planner = encoder, planner
        self.seen = 0
        self.pools = {}
        for frames in lengths:
            step = encoder.clips(frames) // encoder.mesh.size * VIEWS
            rows = capacity * latent_frames(lengths[0]) // latent_frames(frames)
            self.pools[frames] = LatentPool(encoder.mesh, shapes(frames), rows, step)

    def is_ready(self, frames: int) -> bool:
        """Whether `add` need not wait for plans, which are begun."""
        self._planner.expect(frames)
        return self._planner.is_ready(frames, self._encoder.clips(frames))

    def add(self, frames: int) -> None:
        """Renders and encodes clips of a length into its pool."""
        plans = self._planner.take(frames, self._encoder.clips(frames))
        self.pools[frames].add(self._encoder(plans, frames)[0])
        self.seen += len(plans)

    def held_out(self, frames: int, count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """At least `count` unchanged held-out clips.

        Returns:
          arrays (n, ...) by name, and video (n, f, H, W, 3) uint8.
        """
        size = self._encoder.clips(frames)
        count = -(-count // size) * size
        plans = self._planner.held_out(frames, count)
        parts, films = [], []
        for start in range(0, count, size):
            arrays, video = self._encoder(plans[start : start + size], frames)
            parts.append({n: _flat(np.asarray(a))[:, 0] for n, a in arrays.items()})
            film = np.asarray(unpacked(video))
            films.append(film.reshape(size, -1, *film.shape[3:])[:, :frames])
        joined = {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
        return joined, np.concatenate(films)


def _flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, *a.shape[2:])


def latent_frames(frames: int) -> int:
    """F of f pixel frames."""
    return (frames - 1) // STRIDE + 1


def row_shapes(
    frames: int, size: tuple[int, int], channels: int, text: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of one clip in a pool; `text` is (L, C)."""
    dtype = compute_dtype("auto")
    count, height, width = latent_frames(frames), size[0] // STRIDE, size[1] // STRIDE
    return {
        "latents": jax.ShapeDtypeStruct((count, height, width, channels), dtype),
        "camera": jax.ShapeDtypeStruct((count, 20), jnp.float32),
        "plucker": jax.ShapeDtypeStruct((count, height, width, 6 * STRIDE), dtype),
        "text": jax.ShapeDtypeStruct(text, dtype),
        "text_mask": jax.ShapeDtypeStruct(text[:1], jnp.int32),
    }
