"""Light of the small world: the sun and the sky, by the time of day."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sanawm_jax.small_world.scenery.scene import RIDGE_POINTS


class _Sky(NamedTuple):
    """Colours (sRGB) and sun of a time of day."""

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    cloud: tuple[float, float, float]
    mountain: tuple[float, float, float]
    sun: tuple[float, float, float]
    strength: float  # of the sun
    heights: tuple[float, float]  # of the sun, degrees
    size: float  # of the sun, radius in radians
    power: float  # of the sky's light


_SKIES = {
    "clear": _Sky(
        *((0.30, 0.53, 0.82), (0.78, 0.88, 0.94), (0.98, 0.98, 0.97), (0.38, 0.50, 0.62)),
        *((1.0, 0.93, 0.80), 1.55, (30, 52), 0.035, 0.62),
    ),
    "cloudy": _Sky(
        *((0.42, 0.58, 0.76), (0.83, 0.87, 0.90), (0.95, 0.95, 0.95), (0.45, 0.53, 0.60)),
        *((1.0, 0.96, 0.88), 1.15, (32, 55), 0.09, 0.75),
    ),
    "golden": _Sky(
        *((0.40, 0.52, 0.72), (0.98, 0.80, 0.56), (1.0, 0.86, 0.70), (0.52, 0.46, 0.54)),
        *((1.0, 0.76, 0.46), 1.75, (14, 26), 0.05, 0.55),
    ),
    "pink": _Sky(
        *((0.46, 0.48, 0.74), (0.97, 0.76, 0.74), (1.0, 0.86, 0.84), (0.52, 0.44, 0.60)),
        *((1.0, 0.78, 0.66), 1.45, (16, 28), 0.06, 0.60),
    ),
    "turquoise": _Sky(
        *((0.20, 0.56, 0.72), (0.84, 0.94, 0.90), (1.0, 1.0, 0.97), (0.40, 0.58, 0.62)),
        *((1.0, 0.94, 0.80), 1.60, (34, 56), 0.04, 0.62),
    ),
    "dusk": _Sky(
        *((0.14, 0.18, 0.36), (0.62, 0.48, 0.56), (0.46, 0.38, 0.50), (0.20, 0.20, 0.34)),
        *((0.86, 0.66, 0.74), 0.42, (18, 30), 0.10, 0.42),
    ),
    "gray": _Sky(
        *((0.62, 0.67, 0.72), (0.84, 0.86, 0.87), (0.90, 0.91, 0.92), (0.56, 0.60, 0.64)),
        *((1.0, 0.98, 0.95), 0.55, (35, 60), 0.16, 0.95),
    ),
}


def _linear(color) -> np.ndarray:
    return np.array(color, float) ** 2.2


def sky_light(rng: np.random.Generator, name: str, ground, ridges: float = 1.0) -> dict:
    """The lighting fields of an outdoor `Scene`.

    Args:
      ground: sRGB colour of the ground, which colours the light from below.
      ridges: height of the mountains; 0 for an open horizon.
    """
    zenith, horizon, cloud, mountain, tint, strength, heights, size, sky_power = _SKIES[name]
    height, angle = np.deg2rad(rng.uniform(*heights)), rng.uniform(0, 2 * np.pi)
    flat = np.cos(height)
    sun = np.array((flat * np.cos(angle), -np.sin(height), flat * np.sin(angle)))
    sky = np.stack([_linear(c) for c in (zenith, horizon, cloud, mountain)])
    sun_color = _linear(tint) * 1.2 * strength * rng.uniform(0.92, 1.08)
    above = (0.55 * sky[0] + 0.45 * sky[1]) * 0.8 * sky_power + 0.06 * sky_power
    below = 0.45 * _linear(ground) * (sun_color * np.sin(height) + 0.5 * above) + 0.03
    around = np.linspace(0, 2 * np.pi, RIDGE_POINTS, endpoint=False)
    ridge = np.zeros((2, RIDGE_POINTS))
    for row, scale in enumerate((1.3, 0.75)):
        for amplitude, cycles in ((0.080, 2), (0.060, 5), (0.030, 9), (0.012, 17)):
            wave = 1.0 - np.abs(np.sin(cycles / 2 * around + rng.uniform(0, np.pi)))
            ridge[row] += ridges * scale * amplitude * rng.uniform(0.5, 1.2) * wave
    return {
        "sun": sun,
        "sun_color": sun_color,
        "sun_size": size,
        "ambient": np.stack((above, below)),
        "sky": sky,
        "clouds": (rng.uniform(0.25, 0.8), rng.uniform(0.7, 1.2)),
        "ridge": ridge,
        "haze": rng.uniform(0.009, 0.022),
    }


def room_light(rng: np.random.Generator, name: str, walls) -> dict:
    """The same for a room: the sky is outside, light comes in through the windows."""
    light = sky_light(rng, name, walls, ridges=1.2)
    tone = _linear(walls) ** 0.5
    light["ambient"] = np.stack((0.42 * tone, 0.32 * tone)) * rng.uniform(0.9, 1.2)
    light["sun_color"] = light["sun_color"] * 1.35
    light["haze"] = np.float32(0.0)
    return light
