"""What a session needs of a model: start scenes, and worlds that begin there."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from sanawm_jax.camera.live import Steering
from sanawm_jax.camera.mapping import ActionMapping
from sanawm_jax.media.image import load_image
from sanawm_jax.sampling.world_state import Carried, WorldState


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where a world begins.

    Attributes:
      name: for programs.
      title: for people.
      image: a path or a PIL image, as `SanaWM.open_world` takes it.
      prompt: what is in it.
      intrinsics: fx, fy, cx, cy in pixels of the image as text; None: the default field of view.
    """

    name: str
    title: str
    image: Any
    prompt: str
    intrinsics: str | None = None

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return np.asarray(load_image(self.image))


class LiveWorld(Protocol):
    """The part of `sampling.world.World` that a session uses."""

    poses: np.ndarray | None

    @property
    def chunks(self) -> int: ...
    @property
    def prompt(self) -> str: ...
    @property
    def frames_ahead(self) -> int: ...
    @property
    def state(self) -> WorldState: ...
    def step(self, control: Steering | np.ndarray, /) -> Any: ...
    def set_prompt(self, prompt: str, /) -> None: ...
    def restore(self, state: WorldState, /) -> None: ...
    def template(self) -> Carried: ...


class Engine(Protocol):
    """A model that is loaded once and serves all sessions.

    Attributes:
      dropped: frames at the start that are no part of the video, because they steer a refiner.
      device_lock: held by the one thread that uses the device.
      rule: what the keys do.
      scenes: the shelf; the first one is where a visitor begins.
    """

    name: str
    device: str
    width: int
    height: int
    fps: float
    dropped: int
    rule: ActionMapping
    scenes: list[Scene]
    device_lock: threading.Lock

    def load(self, report: Callable[[str], None]) -> None:
        """Reads and compiles everything; says in words what it does."""
        ...

    def open(self, scene: Scene) -> LiveWorld:
        """A new world."""
        ...

    def read(self, frames: Any) -> np.ndarray:
        """A step's frames on the host, (n, H, W, 3) uint8; waits for them."""
        ...
