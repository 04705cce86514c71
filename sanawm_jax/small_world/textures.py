"""Analytic textures of the renderer: patterns and smooth noise from a hit position.

All functions work on flat arrays of rays and fade a pattern to its mean where its features
become smaller than the sampling footprint.
"""

from __future__ import annotations

import jax.numpy as jnp

from sanawm_jax.small_world.palette import TEXTURE_CODE
from sanawm_jax.small_world.scenery.textures import lattice_hash, square_wave


def _bordered(u, v, pattern, width):
    """Bricks, tiles, planks and window panes: (border mask, brightness of the cell)."""
    offset, border_u, border_v, jitter = pattern
    row = jnp.floor(v)
    u = u + offset * row
    column = jnp.floor(u)
    inside_u = 0.5 - jnp.abs(u - column - 0.5) - 0.5 * border_u
    inside_v = 0.5 - jnp.abs(v - row - 0.5) - 0.5 * border_v
    mask = jnp.clip(inside_u / width + 0.5, 0.0, 1.0) * jnp.clip(inside_v / width + 0.5, 0.0, 1.0)
    random = lattice_hash(
        column.astype(jnp.int32), row.astype(jnp.int32), jnp.zeros_like(row, jnp.int32)
    )
    # A border that is absent must not darken cell edges through the softened mask.
    mask = jnp.where((border_u + border_v) > 0.0, mask, 1.0)
    return 1.0 - mask, 1.0 + jitter * (random - 0.5) * 1.6


def _painting(u, v, width):
    """A framed picture on the unit square: disc and hills, as a mix factor."""
    disc = jnp.sqrt((u - 0.62) ** 2 + (v - 0.38) ** 2)
    tone = jnp.clip((0.19 - disc) / width + 0.5, 0.0, 1.0)
    ridge = 0.62 + 0.22 * jnp.abs(2.0 * jnp.abs(1.6 * u - jnp.floor(1.6 * u) - 0.5) - 0.5)
    return jnp.maximum(tone, jnp.clip((v - ridge) / width + 0.5, 0.0, 1.0))


def mix_factor(texture, u, v, pattern, noise, footprint):
    """Mix between the two colours and cell brightness of a surface point.

    Args:
      texture: palette.TEXTURES index of each ray, (R,) int32.
      u, v: position in pattern cells, (R,).
      pattern: four arrays (R,): row offset, border across, border up, jitter.
      noise: smooth noise in [-1, 1] for the marbled texture, (R,).
      footprint: cells that one sample spans, (R,).

    Returns:
      (mix (R,) in [0, 1]: 0 is colour a, brightness (R,), near 1).
    """
    code = TEXTURE_CODE
    width = jnp.clip(footprint, 0.02, 1.0)
    checks = 0.5 - 0.5 * square_wave(u, width) * square_wave(v, width)
    stripes = 0.5 - 0.5 * square_wave(u, width)
    border, brightness = _bordered(u, v, pattern, width)
    fade = jnp.clip(1.6 - 1.6 * footprint, 0.0, 1.0)
    border_mean = 1.0 - (1.0 - pattern[1]) * (1.0 - pattern[2])
    mix = jnp.where(texture == code["checkered"], 0.5 + (checks - 0.5) * fade, 0.0)
    mix = jnp.where(texture == code["striped"], 0.5 + (stripes - 0.5) * fade, mix)
    cells = (texture >= code["brick"]) & (texture <= code["windowed"])
    mix = jnp.where(cells, border_mean + (border - border_mean) * fade, mix)
    mix = jnp.where(texture == code["marbled"], jnp.clip(0.5 + 0.9 * noise, 0.0, 1.0), mix)
    painted = texture == code["painted"]
    # The frame of a painting is drawn dark by the brightness, so it needs no third colour.
    mix = jnp.where(painted, _painting(u, v, width), mix)
    frame = jnp.where(painted, 1.0 - 0.8 * border, 1.0)
    return mix, jnp.where(cells, 1.0 + (brightness - 1.0) * fade, frame)
