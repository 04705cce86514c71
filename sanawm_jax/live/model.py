"""The engine of a real model: the small world, or weights of a user."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sanawm_jax.camera.mapping import get_mapping
from sanawm_jax.live.engine import Scene
from sanawm_jax.live.shelf import shipped_scenes
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.shipped import SMALL_WORLD
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.options import SampleOptions
from sanawm_jax.sampling.refine import LTX2Refiner
from sanawm_jax.sampling.streaming import to_bytes
from sanawm_jax.sampling.world import World
from sanawm_jax.text.prompts import read_prompt

# of weights that do not say how they stream: a chunk of half a second answers keys quickly
_SHORT_CHUNKS = {"num_frame_per_block": 1, "num_cached_blocks": 4}


class ModelEngine:
    """Loads a model and opens worlds of it.

    Args:
      options: the command line.

    Raises:
      InputError: there is no image or prompt to begin with.
    """

    def __init__(self, options: SampleOptions):
        self._options = o = options
        if not o.weights:
            raise InputError("no weights: give --weights with a folder or a hub name")
        if not o.image or not o.prompt:
            raise InputError("a world needs a start: give --image and --prompt")
        self.width, self.height, self.fps = o.width, o.height, o.fps
        self.rule = get_mapping(o.action_mapping)
        self.device_lock = threading.Lock()
        self.name = str(o.weights).rstrip("/").rpartition("/")[2]
        self.device, self.dropped = "", 0
        start = Scene("start", "Start", o.image, read_prompt(o.prompt), o.intrinsics)
        self.scenes = [start, *(shipped_scenes() if o.weights == SMALL_WORLD else [])]
        start.pixels()

    def load(self, report: Callable[[str], None]) -> None:
        """Reads the weights and makes chunks until every program is compiled.

        Raises:
          InputError: see `SanaWM.from_pretrained`, `LTX2Refiner.from_pretrained` and `open_world`.
        """
        o = self._options
        report("reading the weights")
        device = jax.devices()[0]
        self.device = "CPU" if device.platform == "cpu" else device.device_kind
        self._model = SanaWM.from_pretrained(
            str(o.weights),
            dtype=o.dtype,
            offload=o.offload,
            precision=o.precision,
            allow_pickle=o.allow_pickle,
            numerics=o.numerics,
        )
        self._chunks = o.stream({**_SHORT_CHUNKS, **self._model.folder.stream_options()})
        self._refiner = None
        if o.refiner_weights and not o.no_refiner:
            self._refiner = LTX2Refiner.from_pretrained(
                o.refiner_weights, dtype=o.dtype, options=o.refine, offload=o.offload
            )
            self.dropped = (o.sink_size - 1) * self._model.vae_config.temporal_ratio + 1
        report("reading the first picture and the prompt")
        world = self.open(self.scenes[0])
        for stage in ("compiling the first chunk", "compiling the next chunks", "trying it"):
            report(stage)
            self.read(world.step("w"))
            world.restore(world.state)

    def open(self, scene: Scene) -> World:
        """A new world."""
        o = self._options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the default field of view, said once
            return self._model.open_world(
                scene.image,
                scene.prompt,
                height=o.height,
                width=o.width,
                intrinsics=scene.intrinsics,
                options=self._chunks,
                action_mapping=o.action_mapping,
                cfg_scale=o.cfg_scale,
                negative_prompt=read_prompt(o.negative_prompt) if o.negative_prompt else "",
                seed=o.seed,
                refiner=self._refiner,
                fps=o.fps,
                text_length=o.text_length,
            )

    def read(self, frames: Any) -> np.ndarray:
        """A step's frames on the host, (n, H, W, 3) uint8; none while a refiner waits for more."""
        if frames is None:
            return np.zeros((0, self.height, self.width, 3), np.uint8)
        pixels, is_finite = to_bytes(frames)
        if not is_finite:
            raise ValueError("the decoded frames hold NaN or infinity")
        return np.asarray(pixels)
