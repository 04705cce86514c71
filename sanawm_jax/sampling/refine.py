"""Stage 2: stage-1 latents and a prompt to refined latents.

    prompt -> Gemma-3 hidden states -> connectors -> transformer, 3 Euler steps per block of frames

Axis letters: F latent frames, h w latent rows and columns, C latent channels, L text tokens.
Reference: diffusers `SanaWMLTX2Refiner`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.checkpoints.refiner_folder import RefinerFolder
from sanawm_jax.checkpoints.upstream_folder import open_refiner
from sanawm_jax.core.params import Params
from sanawm_jax.memory.offload import check_offload, streaming_of
from sanawm_jax.memory.plan import Need, refiner_need, text_need
from sanawm_jax.refiner.connectors import encode_texts
from sanawm_jax.refiner.rope import video_rope
from sanawm_jax.refiner.sampler import RefinerText, read_text, refine
from sanawm_jax.refiner.state import RefinerStream
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.latents import channels_first, channels_last, read_latents
from sanawm_jax.sampling.options import RefineOptions
from sanawm_jax.sampling.precision import matmul_precision, resolve_dtype
from sanawm_jax.text.prompts import note_if_cut


class LTX2Refiner:
    """The stage-2 model of a folder, ready to be called.

    Its networks are on the device one after the other. They are dropped after each call, unless
    `keep` is set, which is for many clips of a small model. With `offload` block their layers wait
    in host memory, see `memory.offload`.
    """

    def __init__(
        self,
        folder: RefinerFolder,
        *,
        dtype: str = "bfloat16",
        options: RefineOptions | None = None,
        offload: str = "none",
        keep: bool = False,
    ):
        self.folder = folder
        self._kept: dict[str, Any] | None = {} if keep else None
        self.dtype = resolve_dtype(dtype)
        self.options = options or RefineOptions()
        self.offload = check_offload(offload)
        self._is_checked = False

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> LTX2Refiner:
        """Opens a refiner folder in diffusers layout, upstream's that holds one, or a hub name.

        Args:
          options: arguments of the class.

        Raises:
          InputError: it cannot be found or is not a refiner folder.
        """
        return cls(open_refiner(name), **options)

    def _part(self, name: str, *where: Any) -> Any:
        """A network of the folder, loaded by the folder's method `load_NAME`."""
        load = getattr(self.folder, f"load_{name}")
        if self._kept is None:
            return load(self.dtype, *where)
        if name not in self._kept:
            self._kept[name] = load(self.dtype, *where)
        return self._kept[name]

    def noise_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the refiner's noise for latents (1, C, F, h, w): the sink has none."""
        batch, channels, frames, *grid = shape
        return batch, channels, frames - self.options.sink_size, *grid

    def check(
        self,
        shape: tuple[int, ...],
        prompt: str | None,
        noise: str | os.PathLike | np.ndarray | None = None,
    ) -> np.ndarray | None:
        """Checks everything that a call will need, before anything is loaded or compiled.

        Args:
          shape: (1, C, F, h, w) of the latents to refine.
          prompt: what is in the scene.
          noise: see `__call__`.

        Returns:
          The noise as an array.

        Raises:
          InputError: one line on what is wrong.
        """
        if not prompt or not prompt.strip():
            raise InputError("no prompt: the refiner reads it too; give --prompt")
        channels, frames = self.folder.config.in_channels, shape[2]
        if shape[1] != channels:
            raise InputError(f"latents have {shape[1]} channels, the refiner takes {channels}")
        if frames <= self.options.sink_size:
            raise InputError(
                f"latents have {frames} frames, which leaves none to refine after "
                f"--sink_size={self.options.sink_size}"
            )
        if noise is not None:
            noise = read_latents(noise, self.noise_shape(shape), "refiner noise")
        if not self._is_checked:
            self.folder.check()
            self.folder.load_tokenizer()
            self._is_checked = True
        return noise

    def needs(self, shape: tuple[int, ...]) -> list[Need]:
        """The memory that refining latents (1, C, F, h, w) needs, network by network.

        Only one network is on the device at a time; see `memory.plan`.
        """
        folder, options, dtype = self.folder, self.options, np.dtype(self.dtype)
        transformer = refiner_need(
            folder.config,
            shape,
            sink=options.sink_size,
            block=options.refiner_block_size,
            window=options.refiner_kv_max_frames,
            text_length=folder.text_length,
            dtype=dtype,
        )
        return [text_need(folder.text_config, dtype), transformer]

    def __call__(
        self,
        latents: np.ndarray,
        prompt: str,
        *,
        fps: float = 16.0,
        noise: str | os.PathLike | np.ndarray | None = None,
        progress: bool = True,
    ) -> np.ndarray:
        """Refines one clip.

        Args:
          latents: (1, C, F, h, w) of stage 1, normalised.
          prompt: what is in the scene.
          fps: pixel frames per second, from which the transformer's time positions are computed.
          noise: (1, C, F - sink, h, w) array or .npy file that replaces the seed's noise.
          progress: show a progress bar.

        Returns:
          (1, C, F, h, w) float32; the sink frames are the given ones.

        Raises:
          InputError: one line on what is wrong, before anything is compiled.
        """
        noise = self.check(latents.shape, prompt, noise)
        options, (frames, height, width) = self.options, latents.shape[2:]
        text = self.encode_prompt(prompt)
        place, run = streaming_of(self.offload, separate=True)
        graphdef, params = self._part("transformer", place)
        with matmul_precision(self.dtype):
            params, text = read_text(graphdef, params, text, dtype=self.dtype, run=run)
            refined = refine(
                graphdef,
                params,
                jnp.asarray(channels_last(latents), jnp.float32),
                text,
                video_rope(self.folder.config, frames, height, width, fps),
                noise=None if noise is None else jnp.asarray(channels_last(noise), jnp.float32),
                key=jax.random.key(options.refiner_seed),
                sink_frames=options.sink_size,
                block_frames=options.refiner_block_size,
                window_frames=options.refiner_kv_max_frames,
                sigmas=self.folder.sigmas,
                dtype=self.dtype,
                progress=progress,
                run=run,
            )
        return np.asarray(channels_first(refined), np.float32)

    def open_stream(
        self, prompt: str, *, fps: float = 16.0, noise: np.ndarray | None = None, changes: bool
    ) -> tuple[RefinerStream, Callable[[str], RefinerText] | None]:
        """Loads the refiner for latents that come chunk by chunk.

        Args:
          prompt: what is in the scene.
          fps: see `__call__`.
          noise: (1, C, F - sink, h, w), as `check` returns it.
          changes: whether the prompt may change later. If not, the layers that read it are dropped.

        Returns:
          The stream, and the function that reads another prompt for it, None if it cannot change.

        Raises:
          InputError: offload, or a refiner that takes a whole clip at once.
        """
        options = self.options
        if self.offload == "block":
            raise InputError("--streaming keeps all layers on the device; use --offload=none")
        if not options.refiner_block_size:
            raise InputError("--refiner_block_size=0 refines a whole clip; a stream needs blocks")
        text = self.encode_prompt(prompt)
        graphdef, params = self._part("transformer", streaming_of("none", separate=True)[0])

        def with_keys(text: RefinerText) -> tuple[Params, RefinerText]:
            with matmul_precision(self.dtype):
                return read_text(graphdef, params, text, dtype=self.dtype)

        kept, text = with_keys(text)
        stream = RefinerStream(
            graphdef,
            kept,
            self.folder.config,
            text,
            self.folder.sigmas,
            fps,
            options.sink_size,
            options.refiner_block_size,
            options.refiner_kv_max_frames,
            options.refiner_seed,
            self.dtype,
            None if noise is None else jnp.asarray(channels_last(noise), jnp.float32),
        )
        if not changes:
            return stream, None
        return stream, lambda prompt: with_keys(self.encode_prompt(prompt))[1]

    def encode_prompt(self, prompt: str) -> RefinerText:
        """The prompt as the transformer reads it; each network is dropped after it has run."""
        how = streaming_of(self.offload, stays=False)
        tokenizer = self.folder.load_tokenizer()
        note_if_cut(tokenizer, prompt, self.folder.text_length)
        with matmul_precision(self.dtype):
            text = encode_texts(
                [prompt],
                tokenizer,
                self.folder.text_length,
                lambda: self._part("text", *how),
                lambda: self._part("connectors"),
                self.dtype,
            )
        return RefinerText(text)
