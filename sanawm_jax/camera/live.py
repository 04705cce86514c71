"""Held keys to camera poses, a few frames at a time.

What the keys do next depends on the pose, the velocity that is fading, and the keys that were held
in the frame before. `Motion` holds these, so a path can be cut anywhere: the same keys give the
same poses, whether they come as one string or frame by frame from a person.

Axis letters: f pixel frames.
Source: NVlabs/Sana's camera control and diffusers' `action_string_to_c2w`, see `actions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from sanawm_jax.camera.mapping import ActionMapping

_FRAME_SECONDS = 1 / 16
_PRESS_SECONDS = 0.45  # time constant of the velocity while a key is held
_COAST_SECONDS = 1.0  # time constant of the velocity after the key is released


@dataclass(frozen=True)
class Motion:
    """A camera between two frames.

    Attributes:
      c2w: (4, 4) float64 camera-to-world pose of the last frame.
      velocity: (4,) forward, strafe, yaw and pitch per frame.
      held: keys that were held in the last frame.
      pitch: radians above the horizon.
    """

    c2w: np.ndarray = field(default_factory=lambda: np.eye(4))
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(4))
    held: frozenset[str] = frozenset()
    pitch: float = 0.0

    def after(
        self, held: frozenset[str], rule: ActionMapping, extra: Sequence[float] = (0, 0, 0, 0)
    ) -> Motion:
        """The motion one frame later, with these keys held; for `extra` see `Steering`."""
        velocity = _velocity(self, held, rule)
        moved = _moved(self, held, velocity + np.asarray(extra), rule)
        return replace(moved, velocity=velocity)


@dataclass(frozen=True)
class Steering:
    """What a person does during a few frames.

    Attributes:
      keys: keys of the action language that are held.
      extra: forward, strafe (in units of the poses), yaw and pitch (in radians) that sticks and the
        mouse add in every frame. They act at once, and stop at once.
      move, turn: factors of the mapping's two speeds.
    """

    keys: frozenset[str] = frozenset()
    extra: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    move: float = 1.0
    turn: float = 1.0

    def faster(self, rule: ActionMapping) -> ActionMapping:
        """The mapping with this steering's speeds."""
        return replace(
            rule,
            translation_speed=rule.translation_speed * self.move,
            rotation_speed_deg=rule.rotation_speed_deg * self.turn,
        )


def walk(
    motion: Motion,
    held_keys: Sequence[frozenset[str]],
    rule: ActionMapping,
    extra: Sequence[float] = (0, 0, 0, 0),
) -> tuple[Float[np.ndarray, "f 4 4"], Motion]:
    """Poses of the frames in which these keys are held, and the motion after the last of them.

    Args:
      motion: before the first of the frames.
      held_keys: one set of lower-case keys per frame.
      rule: see `ActionMapping`; its speeds are those per frame.
      extra: what sticks and the mouse add in every frame, see `Steering`.
    """
    poses = np.empty((len(held_keys), 4, 4))
    for i, held in enumerate(held_keys):
        motion = motion.after(held, rule, extra)
        poses[i] = motion.c2w
    return poses, motion


def _velocity(motion: Motion, held: frozenset[str], rule: ActionMapping) -> np.ndarray:
    step, turn = rule.translation_speed, math.radians(rule.rotation_speed_deg)
    target = rule.controls(held) * np.array([step, step, turn, turn])
    if not rule.has_inertia or held - motion.held:
        # A newly pressed key sets all velocities at once, also those that are fading.
        return target
    press = 1 - math.exp(-_FRAME_SECONDS / _PRESS_SECONDS)
    coast = 1 - math.exp(-_FRAME_SECONDS / _COAST_SECONDS)
    rate = np.where(np.abs(target) > 1e-12, press, coast)
    return motion.velocity + rate * (target - motion.velocity)


def _moved(
    motion: Motion, held: frozenset[str], velocity: np.ndarray, rule: ActionMapping
) -> Motion:
    limit = math.radians(rule.pitch_limit_deg)
    forward, strafe, yaw_step, pitch_step = velocity
    pitch, wanted = motion.pitch, motion.pitch + pitch_step
    if abs(wanted) <= limit:
        pitch = wanted
    elif rule.cuts_at_limit:
        pitch_step = math.copysign(limit, wanted) - pitch
        pitch = math.copysign(limit, wanted)
    else:
        pitch_step = 0.0
    pose = np.eye(4)
    rotation = turn_right(yaw_step) @ motion.c2w[:3, :3] @ _look_up(pitch_step)
    ahead = _level(rotation[:, 2], rule.heading_eps)
    aside = _level(rotation[:, 0], rule.heading_eps)
    pose[:3, :3] = rotation
    pose[:3, 3] = motion.c2w[:3, 3] + (ahead * forward + aside * strafe)
    return Motion(pose, velocity, held, pitch)


def _level(axis: np.ndarray, eps: float) -> np.ndarray:
    flat = axis * np.array([1.0, 0.0, 1.0])
    length = np.linalg.norm(flat)
    return flat / (length + eps) if length > 0 else flat


def turn_right(angle: float) -> Float[np.ndarray, "3 3"]:
    """(3, 3) rotation by radians to the right, around the y axis of the world."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _look_up(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
