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

import dataclasses
import math
import reprlib

import numpy as np
from jaxtyping import Float32

from sanawm_jax.camera.live import Motion, walk
from sanawm_jax.camera.mapping import get_mapping
from sanawm_jax.runtime.errors import InputError

ACTION_KEYS = frozenset("wasdijkl")
MAX_FRAMES = 100_000  # 104 minutes at 16 fps; a typing error must not fill the memory

_WIDE_COMMA = "\uff0c"
_HINT = 'write segments of <keys>-<frames>, for example "w-40,dw-20,none-8"'


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
    return keys_to_c2w(parse_actions(text), mapping, translation_speed, rotation_speed_deg)


def keys_to_c2w(
    held_keys: list[frozenset[str]],
    mapping: str = "sana",
    translation_speed: float | None = None,
    rotation_speed_deg: float | None = None,
) -> Float32[np.ndarray, "f 4 4"]:
    """`actions_to_c2w` of the keys that are held in each frame, f - 1 sets of lower-case keys."""
    rule = get_mapping(mapping)
    step = rule.translation_speed if translation_speed is None else float(translation_speed)
    turn = rule.rotation_speed_deg if rotation_speed_deg is None else float(rotation_speed_deg)
    if not (math.isfinite(step) and math.isfinite(turn)):
        raise InputError("the translation and rotation speeds must be finite numbers")
    rule = dataclasses.replace(rule, translation_speed=step, rotation_speed_deg=turn)
    start = Motion()
    poses, _ = walk(start, held_keys, rule)
    return np.concatenate([start.c2w[None], poses]).astype(np.float32)
