"""One image, a prompt and a camera path become a video: the Python API behind `sample.py`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from sanawm_jax.camera.npy import load_array
from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.checkpoints.files import read_config
from sanawm_jax.checkpoints.folder import Stage1Folder
from sanawm_jax.checkpoints.upstream_folder import open_stage1
from sanawm_jax.core.params import Params, apply
from sanawm_jax.memory.offload import check_offload, frame_mesh, on_all_devices, streaming_of
from sanawm_jax.memory.plan import Need, dit_need, text_need, vae_need
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.precision import check_precision, matmul_precision, resolve_dtype
from sanawm_jax.sampling.request import Request, make_request
from sanawm_jax.sampling.stage1 import Conditions, denoise
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.prompts import MAX_LENGTH, encode_prompt
from sanawm_jax.vae.tiling import LONG_VIDEO, Tiling, decode_windows


@dataclasses.dataclass
class Video:
    """What a call returns.

    Axis letters: N pixel frames, F latent frames.
    """

    latents: np.ndarray  # (1, C, F, h, w) float32
    frames: np.ndarray | None  # (N, H, W, 3) float32 in [0, 1]; None if not decoded
    request: Request


def read_latents(
    value: str | os.PathLike | np.ndarray, shape: tuple[int, ...] | None, name: str = "latents"
) -> np.ndarray:
    """Latents (1, C, F, h, w) from an array or a .npy file, as float32.

    Args:
      value: the array or the file.
      shape: what it must be; None takes any single clip.
      name: what the array is, for messages.

    Raises:
      InputError: unreadable, not finite, or not of `shape` (None takes any with one clip).
    """
    array = load_array(value, name)
    if shape is None and (array.ndim != 5 or array.shape[0] != 1):
        raise InputError(f"{name} have shape {array.shape}, expected (1, C, T, h, w)")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} have shape {array.shape}, this video needs {shape}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{name} hold NaN or infinity")
    return array


class SanaWM:
    """The stage-1 model of a folder, ready to be called.

    Networks are read from disk when first needed.

    Args:
      folder: the opened folder.
      dtype: `bfloat16` or `float32`.
      tiling: how videos are decoded, see `decode_tiling`.
      offload: what stays on the device, see `memory.offload`.
      devices: local devices that share the latent frames of stage 1 out; all else runs on one.
      precision: of the DiT's large matrix products, see `sampling.precision`.

    Raises:
      InputError: an unknown dtype, tiling or offload, too few devices, a precision that this device
        lacks, or a broken VAE configuration.
    """

    def __init__(
        self,
        folder: Stage1Folder,
        *,
        dtype: str = "bfloat16",
        tiling: str | Tiling = "auto",
        offload: str = "none",
        devices: int = 1,
        precision: str = "bf16",
    ):
        self.folder = folder
        self.dtype = resolve_dtype(dtype)
        decode_tiling(tiling, 1)
        self.tiling = tiling
        self.offload = check_offload(offload)
        self.devices = devices
        self.mesh = frame_mesh(devices, offload)
        self.precision = check_precision(precision, self.dtype, devices)
        self.vae_config = folder.vae_config()
        self._parts: dict[str, Any] = {}
        self._checked: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str = "bfloat16",
        tiling: str | Tiling = "auto",
        offload: str = "none",
        devices: int = 1,
        precision: str = "bf16",
        allow_pickle: bool = False,
    ) -> SanaWM:
        """Opens a folder in diffusers or upstream's layout, `small_world`, or a hub name.

        Args:
          dtype, tiling, offload, devices, precision: see the class.
          allow_pickle: see `upstream_folder.open_stage1`.

        Raises:
          InputError: it cannot be found or is not a stage-1 folder.
        """
        folder = open_stage1(name, allow_pickle=allow_pickle)
        return cls(
            folder,
            dtype=dtype,
            tiling=tiling,
            offload=offload,
            devices=devices,
            precision=precision,
        )

    def check(self, *parts: str) -> None:
        """Compares tensor names and shapes of `parts` with the file headers, each once.

        Args:
          parts: of `transformer`, `text_encoder`, `encoder` and `decoder`.

        Raises:
          InputError: what is missing, unexpected or mis-shaped.
        """
        for part in parts:
            if part not in self._checked:
                self.folder.check(part)
                self._checked.add(part)

    def _part(self, name: str, load: Callable[..., Any], *how: Any) -> Any:
        if name not in self._parts:
            if self.offload != "none":
                self._parts.clear()  # one network at a time
            self._parts[name] = load(self.dtype, *how)
        return self._parts[name]

    def release(self) -> None:
        """Forgets the networks, so that the device's memory is free for another stage."""
        self._parts.clear()

    def request(self, image: Any, **options: Any) -> Request:
        """`make_request` with this model's VAE strides."""
        return make_request(
            image,
            temporal=self.vae_config.temporal_ratio,
            spatial=self.vae_config.spatial_ratio,
            **options,
        )

    def latent_shape(self, request: Request) -> tuple[int, int, int, int, int]:
        """(1, C, F, h, w) of a request's latents."""
        config = self.vae_config
        frames = (request.num_frames - 1) // config.temporal_ratio + 1
        rows, columns = (size // config.spatial_ratio for size in (request.height, request.width))
        return 1, config.latent_channels, frames, rows, columns

    def needs(
        self, shape: tuple[int, ...], *, text_length: int, has_guidance: bool, decode: bool
    ) -> list[Need]:
        """What a call needs of the device's memory, network by network; see `memory_plan`.

        Args:
          shape: (1, C, F, h, w) of the latents.
        """
        config, dtype = self.vae_config, np.dtype(self.dtype)
        pixels = config.video_shape(*shape[2:])
        text = GemmaConfig.from_json(read_config(self.folder.part("text_encoder")))
        dit, batch = self.folder.dit_config(), 1 + has_guidance
        found = [
            text_need(text, dtype),
            vae_need(config, dtype, half="encoder", tile=(1, *pixels[1:])),
            dit_need(dit, shape, batch, text_length, dtype, self.precision).shared(self.devices),
        ]
        return [*found, self.decoder_need(shape)] if decode else found

    def decoder_need(self, shape: tuple[int, ...]) -> Need:
        """What decoding latents (1, C, F, h, w) needs of the device's memory."""
        frames, *size = self.vae_config.video_shape(*shape[2:])
        tiling = decode_tiling(self.tiling, frames)
        if tiling.use_framewise:
            frames = min(frames, tiling.tile_sample_min_num_frames + 1)
        dtype = np.dtype(self.dtype)
        return vae_need(self.vae_config, dtype, half="decoder", tile=(frames, *size))

    def __call__(
        self,
        image: Any,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int = 60,
        cfg_scale: float = 5.0,
        flow_shift: float | None = None,
        seed: int = 42,
        latents: str | os.PathLike | np.ndarray | None = None,
        text_length: int = MAX_LENGTH,
        decode: bool = True,
        progress: bool = True,
        **options: Any,
    ) -> Video:
        """Makes a video.

        Args:
          image, options: see `request.make_request`; or a `Request`, made before.
          prompt: what is in the scene.
          negative_prompt: what to steer away from, read without the chi prompt.
          steps: Euler steps.
          cfg_scale: guidance; 1 or less switches it off and halves the work.
          flow_shift: shift of the schedule; the folder's by default.
          seed: of the initial noise.
          latents: initial noise (1, C, F, h, w) in place of the seed's.
          text_length: text tokens L.
          decode: also decode the latents to frames; False needs no decoder.
          progress: show a progress bar.

        Raises:
          InputError: one line on what is wrong, before anything is compiled.
        """
        request = image if isinstance(image, Request) else self.request(image, **options)
        shape = self.latent_shape(request)
        noise = None if latents is None else read_latents(latents, shape)
        schedule = self.folder.schedule()
        if flow_shift is not None:
            if not flow_shift > 0:
                raise InputError(f"flow_shift={flow_shift} must be positive")
            schedule = dataclasses.replace(schedule, shift=flow_shift)
        sigmas = schedule.sigmas(steps)
        self.check("transformer", "text_encoder", "encoder", *(["decoder"] if decode else []))

        if noise is None:
            noise = _noise(np.uint32(seed % 2**32), shape)  # as jax.random.key takes an integer
        else:
            noise = jax.device_put(channels_last(noise))
        has_guidance = cfg_scale > 1
        conditions = self._conditions(request, prompt, negative_prompt, has_guidance, text_length)
        first_latent = self._first_latent(request)
        place, run = streaming_of(self.offload)
        if self.mesh is not None:
            place = on_all_devices(self.mesh)
        _, graphdef, params = self._part("transformer", self.folder.load_dit, place, self.precision)
        with matmul_precision(self.dtype):
            sampled = denoise(
                graphdef,
                params,
                noise,
                first_latent,
                conditions,
                sigmas,
                guidance=cfg_scale,
                dtype=self.dtype,
                progress=progress,
                run=run,
                mesh=self.mesh,
            )
        if self.offload != "none":
            del params, run  # which may have layers on the device
            self.release()
        frames = self.decode(sampled) if decode else None
        out = np.asarray(rearrange(sampled, "B F H W C -> B C F H W"), np.float32)
        return Video(out, frames, request)

    def _conditions(
        self, request: Request, prompt: str, negative: str, has_guidance: bool, length: int
    ) -> Conditions:
        how = streaming_of(self.offload, stays=False)
        tower, tokenizer = self._part("text", self.folder.load_text, *how)
        with matmul_precision(self.dtype):
            cond, cond_mask, neg, neg_mask = encode_prompt(
                tower, tokenizer, prompt, negative, max_length=length
            )
        if has_guidance:
            cond = jnp.concatenate([neg, cond])
            cond_mask = jnp.concatenate([neg_mask, cond_mask])
        camera, plucker = camera_conditions(
            request.c2w,
            request.intrinsics,
            request.height,
            request.width,
            self.vae_config.temporal_ratio,
            self.vae_config.spatial_ratio,
        )
        return Conditions(cond, cond_mask, *jax.device_put((camera[None], plucker[None])))

    def _first_latent(self, request: Request) -> jax.Array:
        """(1, 1, h, w, C) normalised latent of the image."""
        return self.encode(jax.device_put(request.pixels[None, None]))

    def encode(self, video: jax.Array) -> jax.Array:
        """Video (1, N, H, W, 3) in [-1, 1] to normalised latents (1, F, h, w, C) float32."""
        _, graphdef, params = self._part("encoder", self.folder.load_encoder)
        with matmul_precision(self.dtype):
            return _encode(graphdef, params, video.astype(self.dtype))

    def decode(self, latents: jax.Array) -> np.ndarray:
        """Latents (1, F, h, w, C) to frames (N, H, W, 3) float32 in [0, 1]."""
        frames, height, width = self.vae_config.video_shape(*latents.shape[1:4])
        video = np.empty((frames, height, width, 3), np.float32)
        done = 0
        for window in self.decode_stream(latents):
            video[done : done + len(window)] = window
            done += len(window)
        assert done == frames, (done, frames)
        return video

    def decode_stream(self, latents: jax.Array) -> Iterator[np.ndarray]:
        """Decodes window by window, so that no more than one is in memory.

        Args:
          latents: (1, F, h, w, C).

        Yields:
          (n, H, W, 3) float32 in [0, 1]: the frames of each window in order, as `decode` has them.
        """
        _, graphdef, params = self._part("decoder", self.folder.load_decoder)
        tiling = decode_tiling(self.tiling, self.vae_config.video_shape(*latents.shape[1:4])[0])

        # around each tile, since a context around the loop would last while the caller works
        def tile(latents: jax.Array) -> jax.Array:
            with matmul_precision(self.dtype):
                return _decode(graphdef, params, latents)

        for window in decode_windows(tile, latents.astype(self.dtype), self.vae_config, tiling):
            yield np.asarray(_to_unit(window))


def decode_tiling(tiling: str | Tiling, num_frames: int) -> Tiling:
    """The VAE tiles in which a video is decoded.

    Args:
      tiling: `none` decodes all at once. `always` takes the tiles of `LONG_VIDEO`, by the
        reference's rule: along what is larger than a tile. `auto` does too, but leaves up to 97
        frames, the length of one window, in one. A `Tiling` is taken as it is.
      num_frames: pixel frames of the video.

    Raises:
      InputError: unknown name.
    """
    if isinstance(tiling, Tiling):
        return tiling
    if tiling == "none":
        return Tiling(use_tiling=False, use_framewise=False)
    if tiling == "always":
        return LONG_VIDEO
    if tiling == "auto":
        is_long = num_frames > LONG_VIDEO.tile_sample_min_num_frames + 1
        return dataclasses.replace(LONG_VIDEO, use_framewise=is_long)
    raise InputError(f"VAE tiling {tiling!r} is unknown; use auto, none or always")


def channels_last(latents: Any) -> Any:
    """Latents or noise of files, (B, C, F, H, W), as networks take them, (B, F, H, W, C)."""
    return rearrange(latents, "B C F H W -> B F H W C")


@jax.jit(static_argnames="shape")
def _noise(seed: np.uint32 | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal (B, F, H, W, C) of a seed, drawn as (B, C, F, H, W): `shape`."""
    return channels_last(jax.random.normal(jax.random.key(seed), shape, jnp.float32))


@jax.jit(static_argnames="graphdef")
def _encode(graphdef: nnx.GraphDef, params: Params, video: jax.Array) -> jax.Array:
    return apply(graphdef, params, video, method="encode_normalised")


@jax.jit(static_argnames="graphdef")
def _decode(graphdef: nnx.GraphDef, params: Params, latents: jax.Array) -> jax.Array:
    plain = apply(graphdef, params, latents, method="denormalise")
    return apply(graphdef, params, plain, method="decode")


@jax.jit
def _to_unit(video: jax.Array) -> jax.Array:
    return jnp.clip(video[0].astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
