"""A world that goes on: one image and a prompt, then keys or poses chunk by chunk.

    world = model.open_world("room.png", "a room", height=704, width=1280)
    frames = world.step("w")          # the key is held during the next chunk
    world.set_prompt("a room at night")
    kept = world.state                # a value: keep it, save it, go on from it again
    world.restore(kept)

A step queues its work on the device and returns before the work is done: the diffusion model, the
refiner and the decoder follow each other there, and the caller waits only when it reads the frames.

Axis letters: n pixel frames of a chunk, F latent frames of it, H W rows and columns of a frame, h w
latent rows and columns, C latent channels.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.camera.live import Motion, Steering
from sanawm_jax.camera.mapping import ActionMapping
from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.camera.steering import Keys, chunk_poses
from sanawm_jax.dit.state import DiTState, Window
from sanawm_jax.refiner.sampler import frame_noise
from sanawm_jax.refiner.state import RefinerStream
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.decode import decode_chunk
from sanawm_jax.sampling.precision import matmul_precision
from sanawm_jax.sampling.rollout import denoise_chunk
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.sampling.world_state import Carried, WorldState, check_carried
from sanawm_jax.vae.state import DecoderState

if TYPE_CHECKING:
    from sanawm_jax.sampling.generate import SanaWM

TABLE_FRAMES = 1024  # latent frames of upstream's rotary table


@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays the same during the life of a world.

    Attributes:
      window: how the stream is cut into chunks, and what the softmax layers see.
      sigmas: falling noise levels of a chunk, from 1 down to 0.
      height, width: pixels of a frame.
      intrinsics: (4,) fx, fy, cx, cy in pixels of a frame.
      rule: what the keys do.
      seed: of the noise. Each latent frame has noise of its own, so a longer stream begins as a
        shorter one does.
      noise: (1, F, h, w, C) of all frames, which replaces the seed's.
      guidance: scale of classifier-free guidance; 1 or less switches it off.
      negative_prompt: what guidance steers away from.
      text_length: text tokens.
      decode: whether steps give frames, or latents alone.
    """

    window: Window
    sigmas: tuple[float, ...]
    height: int
    width: int
    intrinsics: np.ndarray
    rule: ActionMapping
    seed: int = 42
    noise: Any = None
    guidance: float = 1.0
    negative_prompt: str = ""
    text_length: int = 300
    decode: bool = True


class World:
    """See the module; `SanaWM.open_world` makes one.

    Attributes:
      latents: (1, F, h, w, C) of the last step, refined if there is a refiner.
      poses: (n, 4, 4) camera-to-world poses of the last step.
    """

    def __init__(
        self,
        model: SanaWM,
        first_latent: jax.Array,
        prompt: str,
        settings: Settings,
        refiner: RefinerStream | None = None,
        read_refiner_prompt: Any = None,
    ):
        self._model, self._first_latent, self._settings = model, first_latent, settings
        self._refiner, self._read_refiner_prompt = refiner, read_refiner_prompt
        self._sigmas = jnp.asarray(np.array(settings.sigmas, np.float32))
        self._intrinsics = np.asarray(settings.intrinsics, np.float32)
        self._carried, self._chunks = Carried(), 0
        self._motion, self._origin = Motion(), np.eye(4)
        self.latents: jax.Array | None = None
        self.poses: np.ndarray | None = None
        self._prompt = ""
        self.set_prompt(prompt)

    @property
    def window(self) -> Window:
        """How the stream is cut into chunks."""
        return self._settings.window

    @property
    def chunks(self) -> int:
        """Chunks so far."""
        return self._chunks

    @property
    def prompt(self) -> str:
        """The text that acts on the next chunk."""
        return self._prompt

    @property
    def latent_frame(self) -> int:
        """Number of the next latent frame."""
        window = self.window
        return window.first + (self._chunks - 1) * window.size if self._chunks else 0

    @property
    def _next_chunks(self) -> list[int]:
        """Latent frames of the chunks of the next step.

        A first chunk that is the given image alone comes with the next one: its camera maps look
        ahead by as many frames.
        """
        window = self.window
        if self._chunks:
            return [window.size]
        return [window.first] if window.first > 1 else [1, window.size]

    @property
    def frames_ahead(self) -> int:
        """n, the pixel frames for which the next step takes poses or keys.

        The first step's first frame is the given image, at the start of the path.
        """
        if self._chunks == 0:
            return self._first_frames
        return self.window.size * self._model.vae_config.temporal_ratio

    def set_prompt(self, prompt: str) -> None:
        """Changes the words; they act from the next chunk on.

        Raises:
          InputError: an empty prompt, or a refiner that was opened for one prompt alone.
        """
        if not prompt.strip():
            raise InputError("the prompt is empty; say what is in the scene")
        settings = self._settings
        if self._refiner is not None and self._prompt:
            if self._read_refiner_prompt is None:
                raise InputError("this world's refiner was opened for one prompt; it cannot change")
            self._refiner.text = self._read_refiner_prompt(prompt)
        self._text = self._model.read_prompt(
            prompt,
            settings.negative_prompt if settings.guidance > 1 else None,
            settings.text_length,
        )
        self._prompt = prompt

    def step(
        self,
        control: Keys | Sequence[Keys] | Steering | np.ndarray,
        intrinsics: np.ndarray | None = None,
    ) -> jax.Array | None:
        """Makes the next chunk.

        Args:
          control: keys that are held during the whole chunk, such as "wd" or ""; a `Steering` in
            the same way; a list with the keys of each frame; or (n, 4, 4) camera-to-world poses,
            see `frames_ahead`.
          intrinsics: (n, 4) fx, fy, cx, cy of each frame in pixels; None keeps those before.

        Returns:
          (n, H, W, 3) float32 in [0, 1]. The work may still run: reading the frames waits for it.
          With a refiner, the frames of whole blocks alone and not those of the sink, which steers
          the refiner and is no part of the video. None if the world does not decode.

        Raises:
          InputError: a wrong number of frames or poses, unknown keys, or no noise left.
        """
        poses, motion = self._poses(control)
        if self._chunks == 0:
            self._origin = poses[0]
        if intrinsics is not None:
            if intrinsics.shape != (len(poses), 4):
                raise InputError(
                    f"intrinsics have shape {intrinsics.shape}, this chunk needs {(len(poses), 4)}"
                )
            self._intrinsics = intrinsics[-1]
        else:
            intrinsics = np.tile(self._intrinsics, (len(poses), 1))
        frames = self._compute(self._conditions(poses, intrinsics))
        self._motion, self.poses = motion, poses
        return frames

    @property
    def has_rest(self) -> bool:
        """Whether the refiner holds frames back that are not a whole block."""
        state = self._carried.refiner
        return state is not None and state.waiting.shape[1] > 0

    def finish(self) -> jax.Array | None:
        """The frames (n, H, W, 3) that the refiner holds back, refined as a shorter block.

        Nothing can follow them in the stream. None if there are none, or the world decodes nothing.
        """
        state = self._carried.refiner
        if self._refiner is None or state is None or not self.has_rest:
            return None
        with matmul_precision(self._model.dtype):
            self.latents, state = self._refiner.finish(state)
            self._carried = dataclasses.replace(self._carried, refiner=state)
            return self._decoded(self.latents, is_start=False)

    @property
    def state(self) -> WorldState:
        """A copy of the world as it is now, on the device."""
        return WorldState(
            jax.tree.map(jnp.copy, self._carried),
            self._chunks,
            self._motion,
            self._origin.copy(),
            self._prompt,
        )

    def restore(self, state: WorldState) -> None:
        """Goes back, or on, to a state; the state itself stays as it is.

        Raises:
          InputError: it is of another network, size or window.
        """
        check_carried(state.carried, self.template(), state.chunks)
        self._carried = jax.tree.map(jnp.array, state.carried)
        self._chunks, self._motion, self._origin = state.chunks, state.motion, state.origin.copy()
        if state.prompt != self._prompt:
            self.set_prompt(state.prompt)

    def template(self) -> Carried:
        """The shapes and dtypes of what a step leaves behind, as `jax.ShapeDtypeStruct`s."""
        for name in ("transformer", *(["decoder"] if self._settings.decode else [])):
            self._model.network(name)  # weights are not read while a function is traced
        poses = np.broadcast_to(np.eye(4), (self._first_frames, 4, 4))
        intrinsics = np.tile(self._intrinsics, (len(poses), 1))
        first = self.window.first
        conditions = _cut(self._conditions(poses, intrinsics, is_start=True), 0, first)
        noise = jax.ShapeDtypeStruct(self._chunk_shape(first), jnp.float32)
        latents, dit = jax.eval_shape(self._denoise, None, noise, self._first_latent, conditions)
        decoder = refiner = None
        if self._settings.decode:
            _, decoder = jax.eval_shape(self._decode, latents, None)
        if self._refiner is not None:
            refiner = jax.eval_shape(self._refiner.step, latents)[1]
        return Carried(dit, refiner, decoder)

    @property
    def _first_frames(self) -> int:
        window = self.window
        latents = window.first if window.first > 1 else 1 + window.size
        return (latents - 1) * self._model.vae_config.temporal_ratio + 1

    def _chunk_shape(self, frames: int) -> tuple[int, ...]:
        return (1, frames, *self._first_latent.shape[2:])

    def _poses(self, control: Any) -> tuple[np.ndarray, Motion]:
        """Poses (n, 4, 4) of the next chunk, and the motion at its last frame."""
        return chunk_poses(
            self._motion,
            control,
            self._settings.rule,
            self.frames_ahead,
            is_start=self._chunks == 0,
        )

    def _conditions(
        self, poses: np.ndarray, intrinsics: np.ndarray, *, is_start: bool | None = None
    ) -> Conditions:
        """The text, and the camera inputs of the chunk's latent frames."""
        settings, vae = self._settings, self._model.vae_config
        is_start = self._chunks == 0 if is_start is None else is_start
        if not is_start:  # poses are relative to the first frame, and a latent frame sees its own
            poses = np.concatenate([self._origin[None], poses])
            intrinsics = np.concatenate([intrinsics[:1], intrinsics])
        found = camera_conditions(
            poses,
            intrinsics,
            settings.height,
            settings.width,
            vae.temporal_ratio,
            vae.spatial_ratio,
        )
        camera, plucker = (a[None, 0 if is_start else 1 :] for a in found)
        return Conditions(*self._text, *jax.device_put((camera, plucker)))

    def _noise(self, frames: int) -> jax.Array:
        """Noise (1, F, h, w, C) of the next chunk."""
        settings, first = self._settings, self.latent_frame
        shape = self._chunk_shape(frames)
        if first < TABLE_FRAMES <= first + frames:
            warnings.warn(
                f"the stream is longer than {TABLE_FRAMES} latent frames, where upstream's code "
                "ends; it goes on",
                stacklevel=4,
            )
        if settings.noise is None:
            seed = np.uint32(settings.seed % 2**32)
            return frame_noise(seed, np.int32(first), frames, (1, *shape[2:]))
        noise = settings.noise[:, first : first + frames]
        if noise.shape[1] != frames:
            raise InputError(f"the given noise ends after {settings.noise.shape[1]} latent frames")
        return noise

    def _compute(self, conditions: Conditions) -> jax.Array | None:
        """Queues the work of a step."""
        is_start, done, found = self._chunks == 0, 0, []
        with matmul_precision(self._model.dtype):
            for frames in self._next_chunks:
                latents, dit = self._denoise(
                    self._carried.dit,
                    self._noise(frames),
                    None if self._chunks else self._first_latent,
                    _cut(conditions, done, done + frames),
                )
                self._carried = dataclasses.replace(self._carried, dit=dit)
                self._chunks += 1
                done += frames
                found.append(latents)
            latents = found[0] if len(found) == 1 else jnp.concatenate(found, 1)
            if self._refiner is not None:
                latents, refiner = self._refiner.step(latents, self._carried.refiner)
                self._carried = dataclasses.replace(self._carried, refiner=refiner)
            self.latents = latents
            return self._decoded(latents, is_start=is_start)

    def _denoise(
        self,
        state: DiTState | None,
        noise: jax.Array,
        first_latent: jax.Array | None,
        conditions: Conditions,
    ) -> tuple[jax.Array, DiTState]:
        graphdef, params = self._model.network("transformer")
        return denoise_chunk(
            graphdef,
            params,
            state,
            noise,
            first_latent,
            conditions,
            self._sigmas,
            np.float32(self._settings.guidance),
            window=self.window,
            dtype=self._model.dtype,
        )

    def _decode(
        self, latents: jax.Array, state: DecoderState | None
    ) -> tuple[jax.Array, DecoderState]:
        return decode_chunk(
            *self._model.network("decoder"), latents, state, dtype=self._model.dtype
        )

    def _decoded(self, latents: jax.Array, *, is_start: bool) -> jax.Array | None:
        if not self._settings.decode or not latents.shape[1]:
            return None
        frames, decoder = self._decode(latents, self._carried.decoder)
        self._carried = dataclasses.replace(self._carried, decoder=decoder)
        if is_start and self._refiner is not None:
            sink = self._refiner.sink_frames
            frames = frames[(sink - 1) * self._model.vae_config.temporal_ratio + 1 :]
        return frames


def _cut(conditions: Conditions, start: int, end: int) -> Conditions:
    """The conditions of some of the latent frames."""
    text, mask, camera, plucker = conditions
    assert camera is not None and plucker is not None
    if end - start == camera.shape[1]:
        return conditions
    return Conditions(text, mask, camera[:, start:end], plucker[:, start:end])
