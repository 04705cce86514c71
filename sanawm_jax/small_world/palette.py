"""Colours, textures and materials of the small world, by name."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Names are caption words; values are sRGB in 0..1.
COLORS = {
    "red": (0.86, 0.16, 0.14),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.83, 0.16),
    "lime": (0.62, 0.84, 0.20),
    "green": (0.16, 0.62, 0.26),
    "teal": (0.07, 0.55, 0.53),
    "turquoise": (0.25, 0.82, 0.80),
    "blue": (0.16, 0.38, 0.88),
    "navy": (0.13, 0.19, 0.46),
    "purple": (0.50, 0.22, 0.72),
    "magenta": (0.85, 0.20, 0.60),
    "pink": (0.97, 0.62, 0.74),
    "brown": (0.52, 0.31, 0.16),
    "tan": (0.83, 0.67, 0.46),
    "cream": (0.96, 0.90, 0.75),
    "white": (0.95, 0.95, 0.95),
    "gray": (0.58, 0.60, 0.63),
    "black": (0.13, 0.13, 0.15),
}
COLOR_NAMES = tuple(COLORS)
VIVID = tuple(COLOR_NAMES[:12])
# Patterns at full contrast are most of what a small autoencoder has to store: halving them is
# worth 3.3 dB to the best linear code of 8x8x8 pixels by 48 numbers.
CONTRAST = 0.5

# Caption words; their order is the texture codes of the renderer.
TEXTURES = (
    "plain",
    "checkered",
    "striped",
    "brick",
    "tiled",
    "planked",
    "windowed",
    "marbled",
    "painted",
)
TEXTURE_CODE = {name: code for code, name in enumerate(TEXTURES)}

# texture -> cell size along the face in units of the base cell (across, up), row offset,
# border width (across, up) as a share of the cell, brightness jitter from cell to cell.
_PATTERN = {
    "plain": ((1.0, 1.0), 0.0, (0.0, 0.0), 0.0),
    "checkered": ((1.0, 1.0), 0.0, (0.0, 0.0), 0.0),
    "striped": ((0.8, 1.0), 0.0, (0.0, 0.0), 0.0),
    "brick": ((1.7, 0.75), 0.5, (0.09, 0.18), 0.35),
    "tiled": ((1.1, 1.1), 0.0, (0.10, 0.10), 0.30),
    "planked": ((0.75, 4.0), 0.37, (0.10, 0.02), 0.35),
    "windowed": ((1.15, 1.4), 0.0, (0.46, 0.42), 0.45),
    "marbled": ((1.0, 1.0), 0.0, (0.0, 0.0), 0.0),
    "painted": ((1e6, 1e6), 0.0, (0.12, 0.12), 0.0),
}


class Material(NamedTuple):
    """How a surface looks; the body that wears it adds its size in `pattern_row`."""

    texture: str
    color_a: np.ndarray  # (3,) sRGB: the main colour (bricks, panes, even checks)
    color_b: np.ndarray  # (3,) sRGB: the second colour (mortar, wall around panes, odd checks)
    cell: float  # base cell in world units
    grain: float = 0.15  # strength of the smooth noise on top
    grain_scale: float = 2.2  # noise cells per world unit
    emission: float = 0.0  # share of the colour that glows without light
    gloss: float = 0.0  # strength of the highlight


def color(rng: np.random.Generator, name: str, jitter: float = 0.05) -> np.ndarray:
    """Draw a shade of a named colour, (3,) sRGB."""
    return np.clip(np.array(COLORS[name]) + rng.uniform(-jitter, jitter, 3), 0.04, 0.99)


def contrast(rng: np.random.Generator, base: np.ndarray, strength: float = 0.45) -> np.ndarray:
    """Draw a second colour that is lighter or darker than `base`, (3,) sRGB."""
    target = 0.06 if base.mean() > 0.5 else 0.95
    if rng.random() < 0.35:  # a different hue now and then
        second = color(rng, VIVID[rng.integers(len(VIVID))])
    else:
        second = np.clip(base + (target - base) * strength * rng.uniform(0.8, 1.3), 0.03, 0.99)
    return base + CONTRAST * (second - base)


def material(rng: np.random.Generator, texture: str, name: str, cell: float = 0.3, **kw):
    """Draw a material of a named texture and colour."""
    main = color(rng, name)
    second = contrast(rng, main, 0.5 if texture in ("checkered", "striped", "marbled") else 0.4)
    values = {"grain": rng.uniform(0.08, 0.22), "grain_scale": rng.uniform(1.6, 3.2)}
    values.update(kw)
    if texture == "windowed":  # the named colour is the wall's, the panes get the other one
        pane = np.array((0.55, 0.75, 0.92)) if main.mean() < 0.5 else np.array((0.16, 0.24, 0.38))
        if rng.random() < 0.3:
            pane = np.array((0.98, 0.86, 0.50))
        return Material(texture, pane, main, cell, **values)
    return Material(texture, main, second, cell, **values)


def pattern_row(mat: Material, size: np.ndarray, wraps: bool) -> tuple[np.ndarray, ...]:
    """Fit a material's pattern to a body of extent `size` (3,) world units.

    Returns (counts (3,): whole cells along x, y, z, pattern (4,): row offset, border across,
    border up, jitter, cycles (): cells per world unit, the finest). `wraps`: x runs once around
    the body (spheres, cylinders), so its count must be even for the pattern to close.
    """
    (across, up), offset, border, jitter = _PATTERN[mat.texture]
    cells = mat.cell * np.array((across, up, across))
    counts = np.maximum(1.0, np.round(size / cells))
    if wraps:
        counts[0] = max(4.0, 2.0 * np.round(np.pi * size[0] / (2.0 * cells[0])))
    if mat.texture == "painted":
        counts[:] = 1.0
    extent = np.maximum(size, 1e-3) * np.array((np.pi if wraps else 1.0, 1.0, 1.0))
    cycles = 1.0 if mat.texture == "painted" else float(np.max((counts / extent)[:2]))
    return counts, np.array((offset, *border, jitter)), np.array(cycles)
