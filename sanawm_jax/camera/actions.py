"""Key strings such as "w-40,dw-20" and the camera paths that they describe.

A string is a list of segments `<keys>-<frames>`: the keys are held down for that many frames.
There are two mappings from held keys to motion, because four keys changed their meaning between
releases:

| keys | `sana` (default) | `diffusers` |
| --- | --- | --- |
| w / s | forward / back | forward / back |
| a / d | turn left / right | step left / right |
| i / k | look up / down | look up / down |
| j / l | step left / right | turn left / right |
| speed per frame | 0.025 and 0.6 degrees | 0.05 and 1.2 degrees |
| pitch limit | 60 degrees; the last step stops there | 85 degrees; a step beyond it is ignored |
| inertia | yes | no |

Axis letters: f pixel frames.
Sources: NVlabs/Sana's camera control (`sana`) and `action_string_to_c2w` of diffusers' SANA-WM
pipeline (`diffusers`).
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from sanawm_jax.runtime.errors import InputError

ACTION_KEYS = frozenset("wasdijkl")
MAX_FRAMES = 100_000  # 104 minutes at 16 fps; a typing error must not fill the memory

_FRAME_SECONDS = 1 / 16
_PRESS_SECONDS = 0.45  # time constant of the velocity while a key is held
_COAST_SECONDS = 1.0  # time constant of the velocity after the key is released
_WIDE_COMMA = "\uff0c"
_HINT = 'write segments of <keys>-<frames>, for example "w-40,dw-20,none-8"'


@dataclass(frozen=True)
class ActionMapping:
    """How held keys become motion.

    Attributes:
      forward, strafe, yaw, pitch: the (positive, negative) key of each control. Positive is
        forward, right, turning right and looking up.
      translation_speed: distance per frame, in the units of the poses.
      rotation_speed_deg: degrees per frame.
      pitch_limit_deg: the largest pitch, up or down.
      has_inertia: the velocity approaches the value of the keys gradually instead of at once.
      cuts_at_limit: a pitch step across the limit stops there; otherwise it is ignored.
      heading_eps: added to the length when the heading is normalised.
    """

    strafe: tuple[str, str]
    yaw: tuple[str, str]
    translation_speed: float
    rotation_speed_deg: float
    pitch_limit_deg: float
    has_inertia: bool
    cuts_at_limit: bool
    heading_eps: float
    forward: tuple[str, str] = ("w", "s")
    pitch: tuple[str, str] = ("i", "k")

    def controls(self, held: frozenset[str]) -> Float[np.ndarray, "4"]:
        """Returns (forward, strafe, yaw, pitch), each -1, 0 or 1; opposite keys cancel."""
        pairs = (self.forward, self.strafe, self.yaw, self.pitch)
        return np.array([float(plus in held) - float(minus in held) for plus, minus in pairs])


ACTION_MAPPINGS = {
    "sana": ActionMapping(
        strafe=("l", "j"),
        yaw=("d", "a"),
        translation_speed=0.025,
        rotation_speed_deg=0.6,
        pitch_limit_deg=60.0,
        has_inertia=True,
        cuts_at_limit=True,
        heading_eps=1e-6,
    ),
    "diffusers": ActionMapping(
        strafe=("d", "a"),
        yaw=("l", "j"),
        translation_speed=0.05,
        rotation_speed_deg=1.2,
        pitch_limit_deg=85.0,
        has_inertia=False,
        cuts_at_limit=False,
        heading_eps=0.0,
    ),
}


def get_mapping(name: str) -> ActionMapping:
    """Returns the mapping called `name`; raises `InputError` if there is none."""
    if name not in ACTION_MAPPINGS:
        known = ", ".join(ACTION_MAPPINGS)
        raise InputError(f"unknown action mapping {reprlib.repr(name)}; choose one of: {known}")
    return ACTION_MAPPINGS[name]


def parse_actions(text: str) -> list[frozenset[str]]:
    """Reads an action string into the keys held in each frame.

    White space is ignored, and a full-width comma counts as a comma. In a segment
    `<keys>-<frames>`, the keys are letters of `wasdijkl` in either case, and repeated letters count
    once. `none`, or no letter at all, holds no key. The frames are a positive whole number.

    Args:
      text: for example "w-40,dw-20".

    Returns:
      One set of lower-case keys per frame, in order; the list is never empty.

    Raises:
      InputError: the string or a segment is empty, a key is unknown, a count is not a positive
        whole number, or there are more than `MAX_FRAMES` frames in all.
    """
    compact = "".join(text.replace(_WIDE_COMMA, ",").split())
    if not compact:
        raise InputError(f"the action string is empty; {_HINT}")
    frames: list[frozenset[str]] = []
    for number, segment in enumerate(compact.split(","), start=1):
        if not segment:
            raise InputError(f"action segment {number} is empty; {_HINT}")
        keys, count = _parse_segment(segment)
        if len(frames) + count > MAX_FRAMES:
            raise InputError(
                f"action segment {reprlib.repr(segment)} makes the path longer than "
                f"{MAX_FRAMES} frames; give smaller counts"
            )
        frames += [keys] * count
    return frames


def _parse_segment(segment: str) -> tuple[frozenset[str], int]:
    shown = reprlib.repr(segment)
    letters, dash, digits = segment.rpartition("-")
    if not dash:
        raise InputError(f'action segment {shown} has no "-"; {_HINT}')
    if letters.endswith("-") and digits.isdecimal():
        raise InputError(f"action segment {shown} has a negative frame count; {_HINT}")
    if not digits.isdecimal():
        raise InputError(
            f"action segment {shown} needs a whole number of frames after the last dash; {_HINT}"
        )
    # Any count with so many digits is above MAX_FRAMES, and int() refuses very long numbers.
    count = int(digits) if len(digits.lstrip("0")) <= 9 else 10**9
    if count == 0:
        raise InputError(f"action segment {shown} lasts zero frames; {_HINT}")
    letters = letters.lower()
    keys = frozenset() if letters == "none" else frozenset(letters)
    unknown = "".join(sorted(keys - ACTION_KEYS))
    if unknown:
        raise InputError(
            f"action segment {shown} has unknown keys {reprlib.repr(unknown)}; "
            "known keys are w a s d i j k l, or none"
        )
    return keys, count


def actions_to_c2w(
    text: str,
    mapping: str = "sana",
    translation_speed: float | None = None,
    rotation_speed_deg: float | None = None,
) -> Float32[np.ndarray, "f 4 4"]:
    """Moves a camera according to an action string.

    In each frame the camera turns first and then moves along its new heading, parallel to the
    ground: its height (y) never changes. Diagonal steps are not shortened.

    Args:
      text: an action string, see `parse_actions`.
      mapping: "sana" or "diffusers", see the table at the top of this module.
      translation_speed: distance per frame; None takes that of the mapping.
      rotation_speed_deg: degrees per frame; None takes that of the mapping.

    Returns:
      Camera-to-world poses, one more than there are frames of actions; the first is the identity.
      Under "diffusers" they equal `action_string_to_c2w` of diffusers bit for bit.

    Raises:
      InputError: a bad string, an unknown mapping or a speed that is not finite.
    """
    rule = get_mapping(mapping)
    held_keys = parse_actions(text)
    step = rule.translation_speed if translation_speed is None else float(translation_speed)
    turn = rule.rotation_speed_deg if rotation_speed_deg is None else float(rotation_speed_deg)
    if not (math.isfinite(step) and math.isfinite(turn)):
        raise InputError("the translation and rotation speeds must be finite numbers")
    turn = math.radians(turn)
    full_speed = np.array([step, step, turn, turn])
    velocities = _velocities(held_keys, rule, full_speed)
    return _integrate(velocities, rule).astype(np.float32)


def _velocities(
    held_keys: list[frozenset[str]], rule: ActionMapping, full_speed: np.ndarray
) -> np.ndarray:
    """Returns the velocities per frame, (f, 4): forward, strafe, yaw, pitch."""
    targets = np.stack([rule.controls(held) for held in held_keys]) * full_speed
    if not rule.has_inertia:
        return targets
    press = 1 - math.exp(-_FRAME_SECONDS / _PRESS_SECONDS)
    coast = 1 - math.exp(-_FRAME_SECONDS / _COAST_SECONDS)
    velocities = np.empty_like(targets)
    current, previous = np.zeros(4), frozenset()
    for i, (held, target) in enumerate(zip(held_keys, targets, strict=True)):
        if held - previous:
            # A newly pressed key sets all velocities at once, also those that are fading.
            current = target
        else:
            rate = np.where(np.abs(target) > 1e-12, press, coast)
            current = current + rate * (target - current)
        velocities[i] = current
        previous = held
    return velocities


def _integrate(velocities: np.ndarray, rule: ActionMapping) -> np.ndarray:
    limit = math.radians(rule.pitch_limit_deg)
    poses = np.tile(np.eye(4), (len(velocities) + 1, 1, 1))
    pitch = 0.0
    for i, (forward, strafe, yaw_step, pitch_step) in enumerate(velocities):
        wanted = pitch + pitch_step
        if abs(wanted) <= limit:
            pitch = wanted
        elif rule.cuts_at_limit:
            pitch_step = math.copysign(limit, wanted) - pitch
            pitch = math.copysign(limit, wanted)
        else:
            pitch_step = 0.0
        rotation = _turn_right(yaw_step) @ poses[i, :3, :3] @ _look_up(pitch_step)
        ahead = _level(rotation[:, 2], rule.heading_eps)
        aside = _level(rotation[:, 0], rule.heading_eps)
        poses[i + 1, :3, :3] = rotation
        poses[i + 1, :3, 3] = poses[i, :3, 3] + (ahead * forward + aside * strafe)
    return poses


def _level(axis: np.ndarray, eps: float) -> np.ndarray:
    flat = axis * np.array([1.0, 0.0, 1.0])
    length = np.linalg.norm(flat)
    return flat / (length + eps) if length > 0 else flat


def _turn_right(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _look_up(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
