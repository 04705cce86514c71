"""What the keys do: two mappings from held keys to motion, see the table in `actions`."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sanawm_jax.runtime.errors import InputError


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
