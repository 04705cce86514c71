"""Colours, patterns and materials of the small world, by name."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Names are caption words; values are sRGB in 0..1.
COLORS = {
    "red": (0.74, 0.20, 0.16),
    "orange": (0.88, 0.50, 0.20),
    "yellow": (0.93, 0.76, 0.32),
    "green": (0.36, 0.56, 0.26),
    "teal": (0.16, 0.47, 0.46),
    "turquoise": (0.40, 0.73, 0.72),
    "blue": (0.25, 0.45, 0.72),
    "navy": (0.15, 0.21, 0.37),
    "purple": (0.45, 0.32, 0.56),
    "pink": (0.91, 0.62, 0.66),
    "brown": (0.44, 0.29, 0.19),
    "tan": (0.77, 0.63, 0.45),
    "cream": (0.93, 0.87, 0.73),
    "white": (0.93, 0.93, 0.92),
    "gray": (0.56, 0.56, 0.57),
    "black": (0.16, 0.16, 0.18),
}
COLOR_NAMES = tuple(COLORS)
# Sets of colours that go together; the accents of a scene come from one of them.
HARMONIES = (
    ("red", "cream", "teal", "tan"),
    ("orange", "blue", "cream", "navy"),
    ("yellow", "gray", "navy", "white"),
    ("pink", "turquoise", "white", "red"),
    ("purple", "yellow", "cream", "teal"),
    ("red", "white", "blue", "yellow"),
    ("orange", "brown", "turquoise", "cream"),
    ("teal", "pink", "cream", "brown"),
)
PATTERNS = ("plain", "cells", "striped", "checkered")
PATTERN_CODE = {name: code for code, name in enumerate(PATTERNS)}

# texture -> pattern, cell size (across, up) as a share of the base cell, row offset, border
# (across, up) as a share of the cell, brightness change from cell to cell, contrast of the borders
TEXTURES = {
    "plain": ("plain", (1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.0),
    "brick": ("cells", (1.0, 0.5), 0.5, (0.10, 0.20), 0.28, -0.22),
    "stone": ("cells", (1.0, 0.7), 0.37, (0.07, 0.10), 0.20, -0.20),
    "tiled": ("cells", (1.0, 1.0), 0.0, (0.08, 0.08), 0.14, -0.18),
    "planked": ("cells", (0.4, 3.0), 0.37, (0.12, 0.02), 0.20, -0.24),
    "shingled": ("cells", (0.6, 0.5), 0.5, (0.08, 0.22), 0.24, -0.20),
    "windowed": ("cells", (1.0, 1.3), 0.0, (0.52, 0.46), 0.20, 0.0),
    "striped": ("striped", (0.5, 1.0), 0.0, (0.0, 0.0), 0.0, 0.5),
    "checkered": ("checkered", (1.0, 1.0), 0.0, (0.0, 0.0), 0.0, 0.4),
}
TEXTURE_NAMES = tuple(TEXTURES)


class Material(NamedTuple):
    """How a surface looks; the body that wears it fits whole cells to its size."""

    texture: str
    color_a: np.ndarray  # (3,) sRGB: bricks, panes, even stripes
    color_b: np.ndarray  # (3,) sRGB: mortar, the wall around panes, odd stripes
    cell: float = 0.5  # base cell in world units
    noise: float = 0.14  # strength of the smooth noise
    noise_scale: float = 1.0  # its coarsest cells per world unit
    emission: float = 0.0
    gloss: float = 0.0
    wrap: float = 0.0  # share of the light that goes around, for leaves and snow
    mirror: float = 0.0  # 1 for water
    blotch: float = 0.0  # share of colour b that the noise mixes in


def shade_of(rng: np.random.Generator, name: str, jitter: float = 0.035) -> np.ndarray:
    """A shade of a named colour, (3,) sRGB: a common change of brightness, a small one of hue."""
    change = rng.uniform(-jitter, jitter) + 0.5 * rng.uniform(-jitter, jitter, 3)
    return np.clip(np.array(COLORS[name]) + change, 0.05, 0.97)


def material(rng: np.random.Generator, texture: str, name: str, cell: float = 0.5, **more):
    """Draws a material of a named texture and colour."""
    main = shade_of(rng, name)
    contrast = TEXTURES[texture][5] * rng.uniform(0.7, 1.1)
    goal = 0.08 if contrast < 0 or main.mean() > 0.6 else 0.92
    second = main + (goal - main) * abs(contrast)
    values = {"noise": rng.uniform(0.10, 0.18), "noise_scale": rng.uniform(0.8, 1.4), **more}
    if texture == "windowed":  # the named colour is the wall's
        pane = values.pop("pane", np.array((0.30, 0.38, 0.46)))
        return Material(texture, pane, main, cell, **values)
    return Material(texture, main, second, cell, **values)


def leaves(rng: np.random.Generator, name: str, **more) -> Material:
    """Foliage: strong noise towards a darker second colour, lit from the side too."""
    main = shade_of(rng, name)
    dark = main * np.array((0.50, 0.62, 0.55))
    values = {"noise": 0.34, "noise_scale": 3.4, "wrap": 0.35, "blotch": 0.8, **more}
    return Material("plain", main, dark, **values)


def paint_row(mat: Material | None, size, around: bool) -> tuple[int, np.ndarray]:
    """Pattern code and paint columns (see `scene.PAINT`) of a material on a body of `size`.

    Whole cells fit the body: across its width (`size[0]`) and up its height (`size[1]`). With
    `around`, x runs once around the body, so that an even number of cells closes it.
    """
    if mat is None:
        return 0, np.zeros(19)
    pattern, (across, up), offset, border, jitter, _ = TEXTURES[mat.texture]
    width = np.pi * size[0] if around else size[0]
    count = max(1.0, np.round(width / (mat.cell * across)))
    if around:
        count = max(4.0, 2.0 * np.round(count / 2.0))
    rows = max(1.0, np.round(size[1] / (mat.cell * up)))
    cells = (count / max(width, 1e-3), rows / max(size[1], 1e-3))
    light = [np.asarray(c) ** 2.2 for c in (mat.color_a, mat.color_b)]
    values = [*light[0], *light[1], *cells, offset, *border, jitter]
    values += [
        mat.noise,
        mat.noise_scale,
        mat.emission,
        mat.gloss,
        mat.wrap,
        mat.mirror,
        mat.blotch,
    ]
    return PATTERN_CODE[pattern], np.array(values)
