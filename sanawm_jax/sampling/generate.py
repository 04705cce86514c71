"""One image, a prompt and a camera path become a video: the Python API behind `sample.py`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.checkpoints.files import read_config
from sanawm_jax.checkpoints.folder import Stage1Folder
from sanawm_jax.checkpoints.upstream_folder import open_stage1
from sanawm_jax.core.frames import chunk_starts
from sanawm_jax.core.params import Params, apply
from sanawm_jax.media.video import to_uint8, write_mp4
from sanawm_jax.memory.offload import check_offload, frame_mesh, on_all_devices, streaming_of
from sanawm_jax.memory.plan import Need, dit_need, text_need, vae_need
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.decode import decode_stream, decode_tiling
from sanawm_jax.sampling.latents import channels_first, channels_last, draw_noise, read_latents
from sanawm_jax.sampling.precision import check_precision, matmul_precision, resolve_dtype
from sanawm_jax.sampling.request import Request, make_request
from sanawm_jax.sampling.stage1 import Conditions, denoise
from sanawm_jax.sampling.staggered import denoise_staggered
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.prompts import MAX_LENGTH, encode_prompt
from sanawm_jax.vae.tiling import Tiling

if TYPE_CHECKING:
    from sanawm_jax.sampling.world import World


@dataclasses.dataclass(repr=False)
class Video:
    """What a call returns.

    Axis letters: N pixel frames, F latent frames.
    """

    latents: np.ndarray  # (1, C, F, h, w) float32
    frames: np.ndarray | None  # (N, H, W, 3) float32 in [0, 1]; None if not decoded
    request: Request

    def save(self, path: str | os.PathLike, fps: float = 16.0) -> Path:
        """Writes the frames as an MP4 file.

        Raises:
          InputError: they are not decoded, or the path or the rate cannot be used.
        """
        if self.frames is None:
            raise InputError("this video has no frames: it was made with decode=False")
        return write_mp4(path, to_uint8(self.frames), fps)

    def __repr__(self) -> str:
        shape = None if self.frames is None else self.frames.shape
        return f"Video(latents={self.latents.shape}, frames={shape})"


class SanaWM:
    """The stage-1 model of a folder, ready to be called.

    Networks are read from disk when first needed.

    Args:
      folder: the opened folder.
      dtype: `bfloat16` or `float32`.
      tiling: how videos are decoded, see `decode_tiling`.
      offload: what stays on the device, see `memory.offload`.
      devices: local devices that divide the latent frames of stage 1; all else runs on one.
      precision: number format of the DiT's large matrix products, see `sampling.precision`.

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
        allow_pickle: bool = False,
        numerics: str | None = None,
        **options: Any,
    ) -> SanaWM:
        """Opens a folder in diffusers or upstream's layout, `small_world`, or a hub name.

        Args:
          allow_pickle, numerics: see `checkpoints.upstream_folder.open_stage1`.
          options: arguments of the class.

        Raises:
          InputError: it cannot be found or is not a stage-1 folder.
        """
        return cls(open_stage1(name, allow_pickle=allow_pickle, numerics=numerics), **options)

    def check(self, *parts: str) -> None:
        """Compares tensor names and shapes of `parts` with the file headers, once per part.

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

    def network(self, name: str) -> tuple[nnx.GraphDef, Params]:
        """Graph definition and parameters of `transformer`, `encoder` or `decoder`."""
        if name == "transformer":
            place = None if self.mesh is None else on_all_devices(self.mesh)
            return self._part(name, self.folder.load_dit, place, self.precision)[1:]
        return self._part(name, getattr(self.folder, f"load_{name}"))[1:]

    def drop(self, name: str) -> None:
        """Drops a network, so that its memory is free; it is read again when it is needed."""
        self._parts.pop(name, None)

    def release(self) -> None:
        """Drops the networks, so that the device's memory is free for another stage."""
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
        """The device memory that a call needs, network by network; see `memory.plan`.

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
        """The device memory that decoding latents (1, C, F, h, w) needs."""
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
          cfg_scale: scale of classifier-free guidance; 1 or less switches it off and halves the
            work.
          flow_shift: shift of the schedule; the folder's by default.
          seed: seed of the initial noise.
          latents: initial noise (1, C, F, h, w) that replaces the seed's.
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
        chunk = self._staggered_chunk()
        self.check("transformer", "text_encoder", "encoder", *(["decoder"] if decode else []))

        if noise is None:
            noise = draw_noise(np.uint32(seed % 2**32), shape)  # as jax.random.key takes an integer
        else:
            noise = jax.device_put(channels_last(noise))
        has_guidance = cfg_scale > 1
        conditions = self._conditions(request, prompt, negative_prompt, has_guidance, text_length)
        first_latent = self.encode_image(request.pixels)
        place, run = streaming_of(self.offload)
        if self.mesh is not None:
            place = on_all_devices(self.mesh)
        _, graphdef, params = self._part("transformer", self.folder.load_dit, place, self.precision)
        inputs = (graphdef, params, noise, first_latent, conditions, sigmas)
        how: dict[str, Any] = dict(guidance=cfg_scale, dtype=self.dtype, progress=progress)
        with matmul_precision(self.dtype):
            if chunk is None:
                sampled = denoise(*inputs, **how, run=run, mesh=self.mesh)
            else:
                # chunks of one frame begin with the given image alone
                how_cut = "first_chunk_plus_one" if chunk > 1 else "uniform"
                starts = chunk_starts(shape[2], chunk, how_cut)
                sampled = denoise_staggered(*inputs, starts, **how)
        if self.offload != "none":
            del params, run  # they may hold layers on the device
            self.release()
        frames = self.decode(sampled) if decode else None
        out = np.asarray(channels_first(sampled), np.float32)
        return Video(out, frames, request)

    def _staggered_chunk(self) -> int | None:
        """Latent frames of a chunk, if these weights are sampled chunk after chunk.

        Raises:
          InputError: an option that this sampler does not have.
        """
        published = self.folder.stream_options()
        if "denoising_step_list" in published:
            warnings.warn(
                f"the weights of {self.folder.path} were distilled for --streaming; without it "
                "every frame sees all others, which they were not trained for",
                stacklevel=3,
            )
            return None
        chunk = published.get("num_frame_per_block")
        if chunk is not None and (self.offload == "block" or self.mesh is not None):
            raise InputError(
                "these weights are sampled chunk after chunk, on one device with all layers: use "
                "--devices=1 and --offload=none or model"
            )
        return chunk

    def open_world(self, image: Any, prompt: str, **options: Any) -> World:
        """Opens a world that goes on chunk by chunk; see `open_world` for the options."""
        from sanawm_jax.sampling.open_world import open_world

        return open_world(self, image, prompt, **options)

    def _conditions(
        self, request: Request, prompt: str, negative: str, has_guidance: bool, length: int
    ) -> Conditions:
        text = self.read_prompt(prompt, negative if has_guidance else None, length)
        camera, plucker = camera_conditions(
            request.c2w,
            request.intrinsics,
            request.height,
            request.width,
            self.vae_config.temporal_ratio,
            self.vae_config.spatial_ratio,
        )
        return Conditions(*text, *jax.device_put((camera[None], plucker[None])))

    def read_prompt(
        self, prompt: str, negative: str | None, length: int = MAX_LENGTH
    ) -> tuple[jax.Array, jax.Array]:
        """The text (B, L, C) and its mask (B, L) as `Conditions` takes them.

        Args:
          prompt: what is in the scene.
          negative: what to steer away from, for guidance; None: no guidance.
          length: text tokens L.
        """
        how = streaming_of(self.offload, stays=False)
        tower, tokenizer = self._part("text", self.folder.load_text, *how)
        with matmul_precision(self.dtype):
            cond, cond_mask, neg, neg_mask = encode_prompt(
                tower, tokenizer, prompt, negative or "", max_length=length
            )
        if negative is None:
            return cond, cond_mask
        return jnp.concatenate([neg, cond]), jnp.concatenate([neg_mask, cond_mask])

    def encode_image(self, pixels: np.ndarray) -> jax.Array:
        """An image (H, W, 3) in [-1, 1] to its normalised latent (1, 1, h, w, C) float32."""
        return self.encode(jax.device_put(pixels[None, None]))

    def encode(self, video: jax.Array) -> jax.Array:
        """Video (1, N, H, W, 3) in [-1, 1] to normalised latents (1, F, h, w, C) float32."""
        graphdef, params = self.network("encoder")
        with matmul_precision(self.dtype):
            return encode_pixels(graphdef, params, video.astype(self.dtype))

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
        """Yields the frames of `decode` window by window; see `decode.decode_stream`."""
        graphdef, params = self.network("decoder")
        return decode_stream(graphdef, params, latents, self.vae_config, self.tiling, self.dtype)


@jax.jit(static_argnames="graphdef")
def encode_pixels(graphdef: nnx.GraphDef, params: Params, video: jax.Array) -> jax.Array:
    """Video (1, N, H, W, 3) in [-1, 1] to normalised latents (1, F, h, w, C) float32."""
    return apply(graphdef, params, video, method="encode_normalised")
