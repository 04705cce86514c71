"""Draws the scene of a seed."""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world import indoor, outdoor
from sanawm_jax.small_world.scene import INDOOR, OUTDOOR, Scene


def sample_scene(seed: int) -> Scene:
    """Draw the scene of a seed; even and odd seeds are as likely indoor as outdoor."""
    rng = np.random.default_rng([int(seed), 0x5CE7E])
    family = INDOOR if rng.random() < 0.5 else OUTDOOR
    return (indoor if family == INDOOR else outdoor).compose(rng, int(seed))
