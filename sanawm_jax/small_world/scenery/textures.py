"""Patterns and smooth noise that fade to their mean before they are too fine for a pixel.

All functions work on flat arrays of rays. A footprint is what one pixel spans on the surface, in
the unit of the pattern: cells. Cells below two pixels are gone, so nothing flickers.
"""

from __future__ import annotations

import jax.numpy as jnp

from sanawm_jax.small_world.scenery.palette import PATTERN_CODE

OCTAVES = 4
LACUNARITY = 2.6  # each octave's cells are finer by this factor; with 0.62 of the amplitude
_GAIN = 0.62


def lattice_hash(x, y, z):
    """Integer lattice points -> floats in [0, 1)."""
    h = x.astype(jnp.uint32) * jnp.uint32(374761393)
    h = h + y.astype(jnp.uint32) * jnp.uint32(668265263)
    h = h + z.astype(jnp.uint32) * jnp.uint32(2246822519)
    h = (h ^ (h >> 13)) * jnp.uint32(1274126177)
    h = h ^ (h >> 16)
    return (h & jnp.uint32(0xFFFF)).astype(jnp.float32) * (1.0 / 65536.0)


def value_noise(x, y, z):
    """Smooth random field with one feature per unit, in [-1, 1]."""
    cells = [jnp.floor(v) for v in (x, y, z)]
    fx, fy, fz = (v - c for v, c in zip((x, y, z), cells, strict=True))
    ix, iy, iz = (c.astype(jnp.int32) for c in cells)
    fx, fy, fz = (f * f * (3.0 - 2.0 * f) for f in (fx, fy, fz))

    def edge(j, k):
        a, b = lattice_hash(ix, iy + j, iz + k), lattice_hash(ix + 1, iy + j, iz + k)
        return a + (b - a) * fx

    def face(k):
        a, b = edge(0, k), edge(1, k)
        return a + (b - a) * fy

    low, high = face(0), face(1)
    return 2.0 * (low + (high - low) * fz) - 1.0


def fractal_noise(position, footprint):
    """Octaves of noise, each faded out where its cells get as small as two pixels.

    Args:
      position: three arrays (R,) in cells of the coarsest octave.
      footprint: (R,) cells of the coarsest octave per pixel.

    Returns:
      (R,) about in [-1, 1].
    """
    total, amplitude, scale = 0.0, 0.6, 1.0
    for octave in range(OCTAVES):
        place = [scale * p + 17.3 * octave for p in position]
        keep = jnp.clip(2.0 - 4.0 * footprint * scale, 0.0, 1.0)
        total = total + amplitude * keep * value_noise(*place)
        amplitude, scale = amplitude * _GAIN, scale * LACUNARITY
    return total


def square_wave(x, width):
    """Square wave of period 2 with edges softened to `width`, in [-1, 1]."""
    cell = jnp.floor(x)
    edge = 0.5 - jnp.abs(x - cell - 0.5)
    parity = 1.0 - 2.0 * jnp.abs(cell - 2.0 * jnp.floor(cell * 0.5))
    return parity * jnp.clip(edge / width, 0.0, 1.0)


def pattern_mix(pattern, u, v, shape, footprint_u, footprint_v):
    """Mix between the two colours and brightness of a surface point.

    Args:
      pattern: palette.PATTERNS index of each ray, (R,) int32.
      u, v: position in pattern cells, (R,).
      shape: four arrays (R,): row offset, border across, border up, jitter.
      footprint_u, footprint_v: cells per pixel, (R,).

    Returns:
      (mix (R,) in [0, 1]: 0 is colour a; brightness (R,), near 1).
    """
    offset, border_u, border_v, jitter = shape
    code = PATTERN_CODE
    footprint = jnp.maximum(footprint_u, footprint_v)
    fade = jnp.clip(2.0 - 4.0 * footprint, 0.0, 1.0)
    fade_u = jnp.clip(2.0 - 4.0 * footprint_u, 0.0, 1.0)
    width_u, width_v = jnp.clip(footprint_u, 0.03, 1.0), jnp.clip(footprint_v, 0.03, 1.0)
    stripes = 0.5 - 0.5 * square_wave(u, width_u) * fade_u
    checks = 0.5 - 0.5 * square_wave(u, width_u) * square_wave(v, width_v) * fade
    row = jnp.floor(v)
    shifted = u + offset * row
    column = jnp.floor(shifted)
    inside_u = 0.5 - jnp.abs(shifted - column - 0.5) - 0.5 * border_u
    inside_v = 0.5 - jnp.abs(v - row - 0.5) - 0.5 * border_v
    mask = jnp.clip(inside_u / width_u + 0.5, 0.0, 1.0)
    mask = mask * jnp.clip(inside_v / width_v + 0.5, 0.0, 1.0)
    random = lattice_hash(
        column.astype(jnp.int32), row.astype(jnp.int32), jnp.zeros_like(row, jnp.int32)
    )
    mean = 1.0 - (1.0 - border_u) * (1.0 - border_v)
    cells = mean + (1.0 - mask - mean) * fade
    is_cells = pattern == code["cells"]
    mix = jnp.where(is_cells, cells, 0.0)
    mix = jnp.where(pattern == code["striped"], stripes, mix)
    mix = jnp.where(pattern == code["checkered"], checks, mix)
    # the mortar between bricks, and the wall around panes, keep their brightness
    change = jitter * (random - 0.5) * fade * (1.0 - mix)
    return mix, jnp.where(is_cells, 1.0 + change, 1.0)
