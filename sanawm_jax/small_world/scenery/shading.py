"""Colour of rays: which surface, which paint, how much light.

Axis letters: R rays of one tile of a picture. A tile has one list of bodies that its rays can meet
and one of bodies that can shade what it shows; both lists are short, which is what makes the
renderer fast.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.small_world.scenery import scene as world
from sanawm_jax.small_world.scenery.light import COVERS, occlusion
from sanawm_jax.small_world.scenery.shapes import block_planes, dot, to_local, to_world
from sanawm_jax.small_world.scenery.textures import fractal_noise, pattern_mix
from sanawm_jax.small_world.scenery.tiles import (
    KIND_STARTS,
    nearest,
    over_bodies,
    shade_mask,
    unpack_row,
)

_LIFT = 4e-3  # how far shadow rays start above the surface, world units
_FAR = 40.0  # bodies neither throw shadows nor occlude the sky beyond this depth


def resolve(scene, t, surface, origin, direction):
    """Puts patches on the floor and openings into walls: (surface, point, is sky)."""
    point = [origin[i] + t * direction[i] for i in range(3)]
    is_face = (surface >= world.FIRST_FACE) & (surface != world.FLOOR)
    is_sky = is_face & (scene.is_indoor == 0)
    floor = surface == world.FLOOR
    for index in range(world.NUM_PATCHES):
        x, z, half_x, half_z, yaw, roundness = (scene.patches[index, i] for i in range(6))
        u, _, v = to_local((point[0] - x, 0.0, point[2] - z), jnp.cos(yaw), jnp.sin(yaw))
        u, v = jnp.abs(u / half_x), jnp.abs(v / half_z)
        # A superellipse: 1 is a rectangle, 0 an ellipse.
        inside = jnp.where(roundness > 0.5, jnp.sqrt(u * u + v * v), jnp.maximum(u, v)) < 1.0
        hit = floor & inside & (half_x > 0.0)
        surface = jnp.where(hit, world.FIRST_PATCH + index, surface)
    for index in range(world.NUM_WINDOWS):
        along, height, distance = _window_place(scene.windows[index], point)
        half_x, half_y = scene.windows[index, 5], scene.windows[index, 6]
        bar = jnp.minimum(jnp.abs(along), jnp.abs(height - 0.15 * half_y)) < 0.025
        opening = (jnp.abs(along) < half_x) & (jnp.abs(height) < half_y) & ~bar
        is_sky = is_sky | (is_face & opening & (jnp.abs(distance) < 1e-2))
    return surface, point, is_sky


def _window_place(window, point):
    """Position of points in a window's plane: (along, height, distance behind the plane)."""
    x, y, z = (point[i] - window[i] for i in range(3))
    nx, nz = window[3], window[4]
    return x * nz - z * nx, -y, x * nx + z * nz


def surface_frame(row, surface, point):
    """Normal and pattern place of hits; row (10, R): the bodies' rows of `body_table`.

    Returns:
      normal: three arrays (R,), unit, world; place: three arrays, position in the body's frame;
      u, v: position along the surface in world units.
    """
    center, cos, sin, half, taper = unpack_row(row)
    local = to_local([point[i] - center[i] for i in range(3)], cos, sin)
    # blocks: the plane that is nearest from inside
    best, normal = jnp.full_like(point[0], -jnp.inf), (jnp.zeros_like(point[0]),) * 3
    for plane, offset in block_planes(half, taper):
        length = jnp.sqrt(1.0 + (0.0 if isinstance(plane[1], float) else plane[1] ** 2))
        gap = (dot(plane, local) - offset) / length
        is_best = gap > best
        best = jnp.where(is_best, gap, best)
        normal = [jnp.where(is_best, n, m) for n, m in zip(plane, normal, strict=True)]
    a, h, b = half
    shrink = 0.5 * taper[0] / h
    width = 1.0 - 0.5 * taper[0] - shrink * local[1]
    reach = jnp.sqrt((local[0] / a) ** 2 + (local[2] / b) ** 2)
    is_cap = jnp.abs(local[1]) - h > (reach - width) * a
    zero = jnp.zeros_like(a)
    round_normal = [
        jnp.where(is_cap, zero, local[0] / (a * a)),
        jnp.where(is_cap, jnp.sign(local[1]), width * shrink),
        jnp.where(is_cap, zero, local[2] / (b * b)),
    ]
    ball_normal = [local[i] / (half[i] * half[i]) for i in range(3)]
    is_round = (surface >= KIND_STARTS[1]) & (surface < KIND_STARTS[2])
    is_ball = (surface >= KIND_STARTS[2]) & (surface < world.NUM_BODIES)
    is_body = surface < world.NUM_BODIES
    mixed = [
        jnp.where(is_ball, k, jnp.where(is_round, r, n))
        for n, r, k in zip(normal, round_normal, ball_normal, strict=True)
    ]
    is_side = (is_round & ~is_cap) | is_ball
    flat_x = jnp.abs(mixed[0]) > jnp.abs(mixed[2])
    is_level = ~is_side & (jnp.abs(mixed[1]) > 0.8 * jnp.sqrt(dot(mixed, mixed)))
    angle = _angle(local[0] / a, local[2] / b) * a
    u = jnp.where(flat_x, local[2] + b, local[0] + a)
    u = jnp.where(is_level, local[0] + a, u)
    u = jnp.where(is_side, angle, u)
    v = jnp.where(is_level, local[2] + b, local[1] + h)
    # the room's faces and the patches on its floor
    face = surface - world.FIRST_FACE
    axis = jnp.where(face < 2, 0, jnp.where((face == 4) | (face == 5), 2, 1))
    inward = jnp.where((face == 0) | (face == 2) | (face == 4), 1.0, -1.0)
    flat = [jnp.where(axis == i, inward, 0.0) for i in range(3)]
    wx, wy, wz = to_world(mixed, cos, sin)
    norm = jax.lax.rsqrt(jnp.maximum(wx * wx + wy * wy + wz * wz, 1e-12))
    out = [jnp.where(is_body, m * norm, f) for m, f in zip((wx, wy, wz), flat, strict=True)]
    u = jnp.where(is_body, u, jnp.where(axis == 0, point[2], point[0]))
    v = jnp.where(is_body, v, jnp.where(axis == 1, point[2], -point[1]))
    place = [jnp.where(is_body, m, p) for m, p in zip(local, point, strict=True)]
    return out, place, u, v


def _angle(x, z):
    """Angle around the vertical axis in [0, 2 pi), to 1e-4; far cheaper than arctan2."""
    big, small = jnp.maximum(jnp.abs(x), jnp.abs(z)), jnp.minimum(jnp.abs(x), jnp.abs(z))
    a = small / jnp.maximum(big, 1e-9)
    s = a * a
    r = ((-0.0464964749 * s + 0.15931422) * s - 0.327622764) * s * a + a
    r = jnp.where(jnp.abs(x) > jnp.abs(z), np.pi / 2 - r, r)
    r = jnp.where(z < 0.0, np.pi - r, r)
    return np.pi + jnp.where(x < 0.0, -r, r)


def shadow_and_sky(scene, table, mask, point, normal, blur):
    """(share of the sun that is free, share of the sky that is free), each (R,)."""
    lifted = [p + _LIFT * n for p, n in zip(point, normal, strict=True)]

    def test(carry, kind, index, row):
        lit, sky = carry
        center, cos, sin, half, taper = unpack_row(row)
        local = to_local([lifted[i] - center[i] for i in range(3)], cos, sin)
        sun = to_local([scene.sun[i] for i in range(3)], cos, sin)
        cover = COVERS[kind](local, sun, half, taper, scene.sun_size, blur)
        taken = occlusion(local, to_local(normal, cos, sin), half)
        return lit * (1.0 - cover), sky * (1.0 - taken)

    one = jnp.ones_like(blur)
    return over_bodies(table, mask, (one, one), test)


def _window_light(scene, point, normal, blur):
    """Sunlight that comes in, (R,) in [0, 1], and the sky's light through windows, (R,)."""
    beam, glow = jnp.zeros_like(blur), jnp.zeros_like(blur)
    for index in range(world.NUM_WINDOWS):
        window = scene.windows[index]
        half_x, half_y = window[5], window[6]
        along, height, distance = _window_place(window, point)
        approach = scene.sun[0] * window[3] + scene.sun[2] * window[4]
        t = -distance / jnp.where(approach > 1e-3, approach, 1e9)
        along_sun = scene.sun[0] * window[4] - scene.sun[2] * window[3]
        side = half_x - jnp.abs(along + t * along_sun)
        level = half_y - jnp.abs(height - t * scene.sun[1])
        bars = jnp.minimum(jnp.abs(along + t * along_sun), 10.0) - 0.03
        depth = jnp.minimum(jnp.minimum(side, level), bars)
        edge = jnp.clip(0.5 + 0.5 * depth / (scene.sun_size * t + blur), 0.0, 1.0)
        beam = jnp.maximum(beam, edge * (approach > 1e-3) * (half_x > 0.0))
        toward = [window[i] - point[i] for i in range(3)]
        squared = dot(toward, toward) + 0.05
        facing = jnp.clip(dot(normal, toward), 0.0, None) * jnp.maximum(-distance, 0.0)
        area = 4.0 * half_x * half_y
        glow = glow + jnp.where(half_x > 0.0, facing * area / (squared * (squared + area)), 0.0)
    return beam, glow


def sky_color(scene, view, noise):
    """Sky along unit directions: gradient, sun, clouds and two mountain ridges."""
    up = -view[1]
    flat = jnp.sqrt(jnp.maximum(view[0] ** 2 + view[2] ** 2, 1e-6))
    slope = up / flat
    above = jnp.clip(up, 0.0, 1.0)
    rise = 1.0 - (1.0 - above) ** 3
    toward = jnp.clip(dot(scene.sun, view), 0.0, 1.0)
    glow = 0.30 * toward**8 + 0.5 * toward**64 + 6.0 * jnp.clip((toward - 0.9985) * 1500, 0, 1)
    cover = jnp.clip(noise * 1.8 + scene.clouds[0] - 0.6, 0.0, 1.0) * jnp.clip(slope * 5, 0, 1)
    # a direction's place around the horizon: a quarter of the circle is a quarter of the table
    part = view[0] / jnp.maximum(jnp.abs(view[0]) + jnp.abs(view[2]), 1e-6)
    place = jnp.where(view[2] >= 0.0, 1.0 + part, 3.0 - part) * (world.RIDGE_POINTS / 4.0)
    left = jnp.floor(place)
    share, index = place - left, left.astype(jnp.int32)
    masks = []
    for ridge in range(2):
        heights = scene.ridge[ridge]
        low = heights[index % world.RIDGE_POINTS]
        high = heights[(index + 1) % world.RIDGE_POINTS]
        height = low + (high - low) * share
        masks.append(jnp.clip((height - slope) / 0.01 + 0.5, 0.0, 1.0) * (height > 1e-4))
    out = []
    for i in range(3):
        zenith, horizon, cloud, mountain = (scene.sky[row, i] for row in range(4))
        color = horizon + (zenith - horizon) * rise
        color = color + (cloud - color) * cover * 0.85 + glow * scene.sun_color[i] * 0.35
        far = horizon + (mountain - horizon) * 0.35
        near = horizon + (mountain - horizon) * 0.65
        color = color + (far - color) * masks[0]
        out.append(color + (near - color) * masks[1])
    return out


def shade(scene, table, radius, masks, origin, direction, focal):
    """Linear colour of rays from one point.

    Args:
      masks: bodies that the rays can meet, and that their reflections in water can.
      origin: three scalars; direction: three arrays (R,) with a camera depth of 1.
      focal: pixels.

    Returns:
      three arrays (R,).
    """
    always = focal > 0.0
    t, surface = nearest(scene, table, masks[0], origin, direction)

    def look(t, surface):
        surface, point, is_sky = resolve(scene, t, surface, origin, direction)
        length = jnp.sqrt(dot(direction, direction))
        return surface, point, is_sky, length, [d / length for d in direction]

    surface, point, is_sky, length, view = _when(always, look, t, surface)
    rows = jnp.minimum(surface, world.NUM_BODIES - 1)
    row, paint = _when(always, lambda r, s: (table[r].T, scene.paint[s].T), rows, surface)
    normal, place, u, v = _when(always, surface_frame, row, surface, point)

    def texture(u, v, place, normal):
        facing = jnp.maximum(-dot(normal, view), 0.08)
        pixel = t * length / focal / facing
        # One noise serves surfaces, in the body's frame, and clouds, on a plane overhead.
        overhead = scene.clouds[1] / (jnp.abs(view[1]) + 0.12)
        shift = surface.astype(jnp.float32) * 7.31 * (surface < world.NUM_BODIES)
        cells = place, paint[13], shift
        spot = [
            jnp.where(is_sky, view[i] * overhead + 50.0, cells[0][i] * cells[1] + cells[2])
            for i in range(3)
        ]
        return spot, jnp.where(is_sky, overhead / focal, pixel * paint[13]), pixel, facing

    spot, footprint, pixel, facing_view = _when(always, texture, u, v, place, normal)
    noise = _when(always, fractal_noise, spot, footprint)

    def patterns(u, v, pixel):
        shape = [paint[8 + i] for i in range(4)]
        across, up = paint[6], paint[7]
        code = scene.pattern[surface]
        return pattern_mix(code, u * across, v * up, shape, pixel * across, pixel * up)

    mix, tone = _when(always, patterns, u, v, pixel)
    is_solid = ~is_sky & (t < _FAR)
    blur = 0.006 + 0.5 * t / focal
    mask = shade_mask(scene, radius, point, is_solid)
    lit, free = shadow_and_sky(scene, table, mask, point, normal, blur)
    inside = scene.is_indoor > 0
    beam, glow = _when(inside, lambda p, n: _window_light(scene, p, n, blur), point, normal)
    has_lamps = (scene.lamps[:, 3:6] > 0.0).any()
    warm = _when(has_lamps, lambda p, n: _lamp_light(scene, p, n), point, normal)
    sky = _when(is_sky.any(), lambda v, n: sky_color(scene, v, n), view, noise)
    has_mirror = (paint[17] > 0.0).any()
    reflected = _when(
        has_mirror,
        lambda t: _reflection(scene, table, masks[1] & has_mirror, origin, direction, t),
        t,
    )

    def finish(lit, free, noise, mix, tone):
        sun_on = lit * _facing(scene, normal, paint[16]) * jnp.where(inside, beam, 1.0)
        free = free * _corners(scene, point, normal)
        shine = _highlight(scene, view, normal) * paint[15] * sun_on
        ripple = paint[17] * jnp.clip(0.12 + 0.88 * (1.0 - facing_view) ** 3, 0.0, 1.0)
        fog = 1.0 - jnp.exp(-scene.haze * t * length)
        above = 0.5 - 0.5 * normal[1]
        blotch = jnp.clip(0.5 + 0.9 * noise, 0.0, 1.0) * (1.0 - mix)
        mix = jnp.maximum(mix, blotch * paint[18])
        tone = tone * (1.0 + paint[12] * noise)
        out = []
        for i in range(3):
            color_a, color_b = paint[i], paint[3 + i]
            albedo = (color_a + (color_b - color_a) * mix) * tone
            ambient = scene.ambient[1, i] + (scene.ambient[0, i] - scene.ambient[1, i]) * above
            window = glow * 0.8 * (scene.sky[0, i] + scene.sky[1, i])
            light = (ambient + warm[i] + window) * free + scene.sun_color[i] * sun_on
            color = albedo * (light + paint[14] * (1.0 - mix)) + shine * scene.sun_color[i]
            color = color + (reflected[i] - color) * ripple
            color = color + (scene.sky[1, i] - color) * fog
            out.append(jnp.where(is_sky, sky[i], color))
        return out

    return _when(always, finish, lit, free, noise, mix, tone)


def _when(flag, function, *args):
    """`function(*args)` where `flag` holds, else zeros.

    On a CPU it skips work that a tile does not need. It also keeps XLA's fusions from computing a
    stage again for each of its uses: without it a picture takes ten times as long.
    """
    shapes = jax.eval_shape(function, *args)

    def nothing(*_):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(flag, function, nothing, *args)


def _facing(scene, normal, wrap):
    """Cosine to the sun; leaves, with their wrap, also shine from the side."""
    cosine = dot(normal, [scene.sun[i] for i in range(3)])
    return jnp.clip((cosine + wrap) / (1.0 + wrap), 0.0, 1.0)


def _corners(scene, point, normal):
    """Share of the sky or room that edges leave free: the foot of things, and room corners."""
    foot = 1.0 - 0.25 * jnp.exp(5.0 * point[1]) * (1.0 - jnp.abs(normal[1]))
    dark = jnp.ones_like(point[0])
    for axis in range(3):
        off = 1.0 - jnp.abs(normal[axis])
        for gap in (point[axis] - scene.room_min[axis], scene.room_max[axis] - point[axis]):
            dark = dark * (1.0 - 0.30 * off * jnp.exp(-3.0 * jnp.maximum(gap, 0.0)))
    return foot * jnp.where(scene.is_indoor > 0, dark, 1.0)


def _lamp_light(scene, point, normal):
    """Light of lanterns, three arrays (R,); it passes through bodies."""
    total = [jnp.zeros_like(point[0])] * 3
    for index in range(world.NUM_LAMPS):
        lamp = scene.lamps[index]
        toward = [lamp[i] - point[i] for i in range(3)]
        squared = dot(toward, toward)
        cosine = dot(normal, toward) / jnp.sqrt(squared + 1e-4)
        power = jnp.clip(0.35 + 0.65 * cosine, 0.0, 1.0) / (1.0 + lamp[6] * squared)
        total = [part + lamp[3 + i] * power for i, part in enumerate(total)]
    return total


def _highlight(scene, view, normal):
    half = [scene.sun[i] - view[i] for i in range(3)]
    norm = jax.lax.rsqrt(dot(half, half) + 1e-6)
    return jnp.clip(dot(normal, half) * norm, 0.0, 1.0) ** 40


def _reflection(scene, table, mask, origin, direction, t):
    """What flat water mirrors, three arrays (R,): bodies in plain light, and the sky.

    A mirrored ray is the ray of a camera under the water with its y axis turned over.
    """
    source = (origin[0], -origin[1], origin[2])
    ray = (direction[0], -direction[1], direction[2])
    reach, surface = nearest(scene, table, mask, source, ray, least=t)
    length = jnp.sqrt(dot(ray, ray))
    view = [d / length for d in ray]
    is_body = surface < world.NUM_BODIES
    paint = scene.paint[surface].T
    sky = sky_color(scene, view, jnp.full_like(t, -0.2))
    fog = 1.0 - jnp.exp(-scene.haze * reach * length)
    out = []
    for i in range(3):
        light = 0.75 * scene.ambient[0, i] + 0.45 * scene.sun_color[i]
        plain = 0.7 * paint[i] + 0.3 * paint[3 + i]
        body = plain * (light + paint[14])
        body = body + (scene.sky[1, i] - body) * fog
        out.append(jnp.where(is_body, body, sky[i]))
    return out
