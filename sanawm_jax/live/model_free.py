"""A world without a model: a drawing of a fixed scene from the camera's pose alone.

It has the interface of a world, so that the page and the server can be tried and tested in seconds.
The drawing is a ground with coloured tiles, pillars and a sky, one ray per pixel.

Axis letters: n pixel frames of a chunk, H W rows and columns of a frame.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sanawm_jax.camera.live import Motion
from sanawm_jax.camera.mapping import get_mapping
from sanawm_jax.camera.steering import chunk_poses
from sanawm_jax.live.engine import Scene
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.world_state import Carried, WorldState, check_carried

CHUNK = 8  # frames
EYE = 0.5  # height of the camera above the ground
_SKIES = {"day": (96, 152, 220), "dusk": (214, 120, 92), "night": (30, 34, 72)}
# x, z, radius and colour of each pillar
_PILLARS = np.array(
    [
        (-0.9, 2.2, 0.22, 205, 70, 60),
        (0.8, 2.8, 0.28, 70, 130, 205),
        (0.1, 4.5, 0.40, 235, 190, 70),
        (-2.4, 3.6, 0.35, 90, 175, 110),
        (2.6, 1.4, 0.30, 160, 95, 190),
        (-1.6, -1.8, 0.30, 225, 130, 60),
        (1.2, -2.6, 0.35, 80, 190, 190),
    ]
)


def draw(c2w: np.ndarray, height: int, width: int, sky: tuple[int, ...]) -> np.ndarray:
    """One frame (H, W, 3) uint8, seen from a camera-to-world pose (4, 4) with OpenCV axes."""
    focal = 0.7 * width
    x = (np.arange(width) - (width - 1) / 2) / focal
    y = (np.arange(height) - (height - 1) / 2) / focal
    camera = np.stack(np.broadcast_arrays(x[None], y[:, None], 1.0), -1)
    ray = camera @ c2w[:3, :3].T
    origin = c2w[:3, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(ray[..., 1] > 1e-6, (EYE - origin[1]) / ray[..., 1], np.inf)
        ground = origin[[0, 2]] + np.where(np.isfinite(depth), depth, 0)[..., None] * ray[..., ::2]
        tile = np.floor(2 * ground).astype(np.int64)
    odd = (tile.sum(-1) % 2).astype(bool)
    tint = (tile[..., 0] * 73 + tile[..., 1] * 151)[..., None] * np.array([3, 5, 7]) % 40
    base = np.where(odd[..., None], (190, 182, 165), (104, 112, 98)) + tint - 20
    fog = np.exp(-np.where(np.isfinite(depth), depth, 1e3) / 9)[..., None]
    up = np.clip(-ray[..., 1:2] / np.linalg.norm(ray, axis=-1, keepdims=True), 0, 1)
    above = np.array(sky) * (1 - 0.45 * up) + 60 * (1 - up) ** 6
    colour = np.where(np.isfinite(depth)[..., None], base * fog + above * (1 - fog), above)
    flat = ray[..., ::2]
    square = (flat**2).sum(-1)
    for px, pz, radius, *paint in _PILLARS:
        offset = np.array([px, pz]) - origin[[0, 2]]
        along = (flat * offset).sum(-1)
        inside = along**2 - square * ((offset**2).sum() - radius**2)
        t = (along - np.sqrt(np.maximum(inside, 0))) / np.maximum(square, 1e-9)
        top = origin[1] + t * ray[..., 1]
        hit = (inside > 0) & (t > 1e-3) & (t < depth) & (top > EYE - 1.3) & (top < EYE)
        normal = (flat * t[..., None] - offset) / radius
        light = 0.55 + 0.45 * np.clip(normal @ np.array([-0.6, -0.8]), -0.3, 1)
        near = np.exp(-t / 9)[..., None]
        shade = np.array(paint) * light[..., None] * near + above * (1 - near)
        colour = np.where(hit[..., None], shade, colour)
        depth = np.where(hit, t, depth)
    return np.clip(colour, 0, 255).astype(np.uint8)


class ModelFreeWorld:
    """See the module; `step` returns (n, H, W, 3) uint8."""

    def __init__(self, engine: ModelFreeEngine, prompt: str, sky: tuple[int, ...]):
        self._engine, self._sky = engine, sky
        self._motion, self._origin = Motion(), np.eye(4)
        self.chunks, self.prompt = 0, prompt
        self._first_prompt = prompt
        self.poses: np.ndarray | None = None

    @property
    def frames_ahead(self) -> int:
        return CHUNK if self.chunks else CHUNK + 1

    def set_prompt(self, prompt: str) -> None:
        """The words give the sky its colour."""
        if not prompt.strip():
            raise InputError("the prompt is empty; say what is in the scene")
        self.prompt = prompt

    def sky(self) -> tuple[int, ...]:
        """Colour of the sky under the prompt."""
        if self.prompt == self._first_prompt:
            return self._sky
        number = zlib.crc32(self.prompt.encode())
        return tuple(60 + (number >> shift) % 160 for shift in (0, 8, 16))

    def step(self, control: Any) -> np.ndarray:
        """The next chunk."""
        self.poses, self._motion = chunk_poses(
            self._motion,
            control,
            self._engine.rule,
            self.frames_ahead,
            is_start=self.chunks == 0,
        )
        self.chunks += 1
        time.sleep(self._engine.seconds)
        size, sky = (self._engine.height, self._engine.width), self.sky()
        return np.stack([draw(pose, *size, sky) for pose in self.poses])

    @property
    def state(self) -> WorldState:
        return WorldState(Carried(), self.chunks, self._motion, self._origin, self.prompt)

    def restore(self, state: WorldState) -> None:
        check_carried(state.carried, self.template(), state.chunks)
        self._motion, self._origin = state.motion, state.origin
        self.chunks, self.prompt = state.chunks, state.prompt

    def template(self) -> Carried:
        return Carried()


class ModelFreeEngine:
    """Serves `ModelFreeWorld`s.

    Args:
      seconds: that a chunk takes in addition to its drawing.
    """

    name, device, fps, dropped = "model-free drawing", "CPU", 16.0, 0

    def __init__(self, height: int = 128, width: int = 128, seconds: float = 0.0):
        self.height, self.width, self.seconds = height, width, seconds
        self.rule = get_mapping("sana")
        self.device_lock = threading.Lock()
        size = (height, width)
        self.scenes = [
            Scene(name, title, draw(np.eye(4), *size, _SKIES[name]), f"coloured pillars at {name}")
            for name, title in (("day", "Day"), ("dusk", "Dusk"), ("night", "Night"))
        ]

    def load(self, report: Callable[[str], None]) -> None:
        report("drawing")

    def open(self, scene: Scene) -> ModelFreeWorld:
        return ModelFreeWorld(self, scene.prompt, _SKIES.get(scene.name, _SKIES["day"]))

    def read(self, frames: np.ndarray) -> np.ndarray:
        return frames
