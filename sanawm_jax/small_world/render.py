"""Ray caster of the small world, in jax.numpy under jit; one code for CPU and GPU.

Pixel convention, the ray map's of the model: the integer coordinate x is the centre of pixel
column x, so its ray is ((x - cx) / fx, (y - cy) / fy, 1) in the camera's OpenCV axes, scaled to
z = 1: a ray parameter t is therefore the depth along the optical axis. With samples = n, a pixel
averages n x n rays at offsets ((i + 0.5) / n - 0.5), symmetric around its centre; then a lens
spreads it over its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.small_world import scene as world
from sanawm_jax.small_world.geometry import (
    box_interval,
    cylinder_interval,
    room_exit,
    sphere_interval,
    to_local,
)
from sanawm_jax.small_world.scenery.textures import value_noise
from sanawm_jax.small_world.textures import mix_factor

jax.tree_util.register_dataclass(
    world.Scene, [f.name for f in dataclasses.fields(world.Scene)], meta_fields=[]
)

_ROOM, _BOX, _SPHERE, _CYLINDER = 0, 1, 2, 3
# Standard deviation of the lens's Gaussian point spread, in pixels. Edges that are sharper than a
# camera makes them cost a small autoencoder most of its numbers.
LENS = 0.7
_SHADOW_LIFT = 2e-3  # how far shadow rays start above the surface, world units


def _bodies(scene: world.Scene, casters_only: bool = False) -> list[tuple]:
    """List (interval function, per-body arrays, first surface row) of each kind of body."""
    count = world.NUM_CASTERS if casters_only else world.NUM_BOXES
    yaw = scene.box_yaw[:count]
    boxes = (
        scene.box_center[:count],
        scene.box_half[:count],
        jnp.cos(yaw),
        jnp.sin(yaw),
    )
    first = np.cumsum([world.NUM_FACES, world.NUM_BOXES, world.NUM_SPHERES])
    poles = (scene.cylinder_center, scene.cylinder_radius, scene.cylinder_half)
    return [
        (box_interval, boxes, first[0]),
        (sphere_interval, (scene.sphere_center, scene.sphere_radius), first[1]),
        (cylinder_interval, poles, first[2]),
    ]


def _nearest(scene: world.Scene, origin, direction):
    """First surface of rays from one origin: (t (R,), surface row (R,) int32)."""
    t, face = room_exit(jnp, origin, direction, scene.room_min, scene.room_max)
    best = (t, face.astype(jnp.int32))
    for interval, arrays, first in _bodies(scene):

        def body(carry, row, interval=interval):
            t, surface = carry
            index, center, *shape = row
            relative = [origin[i] - center[i] for i in range(3)]
            near, far = interval(jnp, relative, direction, *shape)
            hit = (near < far) & (near > 1e-4) & (near < t)
            return (jnp.where(hit, near, t), jnp.where(hit, index, surface)), None

        indices = jnp.arange(len(arrays[0]), dtype=jnp.int32) + int(first)
        best, _ = jax.lax.scan(body, best, (indices, *arrays))
    return best


def _lit(scene: world.Scene, point, toward, reach):
    """1 where no body stands between the points (R,) and the light, else 0."""
    free = jnp.ones_like(reach, bool)
    for interval, arrays, _ in _bodies(scene, casters_only=True):

        def body(free, row, interval=interval):
            center, *shape = row
            relative = [point[i] - center[i] for i in range(3)]
            near, far = interval(jnp, relative, toward, *shape)
            return free & ~((near < far) & (near > 0.0) & (near < reach)), None

        free, _ = jax.lax.scan(body, free, arrays)
    return free.astype(jnp.float32)


def _surface_table(scene: world.Scene) -> dict[str, jax.Array]:
    """Geometry of each surface row: centre, half extents, yaw, shape code, normal sign."""
    size = scene.room_max - scene.room_min
    faces, boxes = world.NUM_FACES, world.NUM_BOXES
    balls, poles = world.NUM_SPHERES, world.NUM_CYLINDERS
    middle = jnp.broadcast_to((scene.room_max + scene.room_min) / 2, (faces, 3))
    radius = jnp.repeat(scene.sphere_radius[:, None], 3, 1)
    pole = jnp.stack([scene.cylinder_radius, scene.cylinder_half, scene.cylinder_radius], 1)
    half = [jnp.broadcast_to(size / 2, (faces, 3)), scene.box_half, radius, pole]
    yaw = jnp.zeros(world.NUM_SURFACES).at[faces : faces + boxes].set(scene.box_yaw)
    code = np.repeat([_ROOM, _BOX, _SPHERE, _CYLINDER], [faces, boxes, balls, poles])
    return {
        "center": jnp.concatenate(
            [middle, scene.box_center, scene.sphere_center, scene.cylinder_center]
        ),
        "half": jnp.concatenate(half),
        "cos": jnp.cos(yaw),
        "sin": jnp.sin(yaw),
        "shape": jnp.asarray(code, jnp.int32),
    }


def _surface_point(table, surface, point):
    """Body frame of hits: unit position in [-1, 1]^3, world normal, face axis, flags."""

    def take(name, *at):
        return table[name][(surface, *at)]

    relative = [point[i] - take("center", i) for i in range(3)]
    cos, sin, shape = take("cos"), take("sin"), take("shape")
    local = to_local(relative, cos, sin)
    half = [take("half", i) for i in range(3)]
    unit = [local[i] / half[i] for i in range(3)]
    size = [jnp.abs(u) for u in unit]
    largest = jnp.maximum(jnp.maximum(size[0], size[1]), size[2])
    axis = jnp.where(size[0] == largest, 0, jnp.where(size[1] == largest, 1, 2))
    around = jnp.sqrt(unit[0] ** 2 + unit[2] ** 2)
    is_side = (shape == _CYLINDER) & (around > size[1])
    round_ = (shape == _SPHERE) | is_side
    flip = jnp.where(shape == _ROOM, -1.0, 1.0)
    axis = jnp.where(shape == _CYLINDER, 1, axis)
    normal = []
    for i in range(3):
        flat = jnp.where(axis == i, jnp.sign(unit[i]) * flip, 0.0)
        curved = unit[i] * jnp.where(is_side & (i == 1), 0.0, 1.0)
        normal.append(jnp.where(round_, curved, flat))
    # Rotate back: the inverse yaw.
    nx, ny, nz = to_local(normal, cos, -sin)
    norm = jax.lax.rsqrt(jnp.maximum(nx * nx + ny * ny + nz * nz, 1e-9))
    return local, unit, (nx * norm, ny * norm, nz * norm), axis, round_


def _pattern_position(scene, surface, unit, axis, round_):
    """Position of hits in pattern cells along the face, (u, v)."""
    counts = [scene.counts[surface, i] for i in range(3)]
    s = [(unit[i] * 0.5 + 0.5) for i in range(3)]
    angle = jnp.arctan2(unit[0], unit[2]) * (0.5 / jnp.pi) + 0.5
    u = jnp.where(axis == 0, s[2] * counts[2], s[0] * counts[0])
    v = jnp.where(axis == 1, s[2] * counts[2], s[1] * counts[1])
    return jnp.where(round_, angle * counts[0], u), jnp.where(round_, s[1] * counts[1], v)


def _sky_color(scene, direction, noise):
    """Sky seen along unit directions: gradient, clouds and sun, three (R,) arrays."""
    up = jnp.clip(-direction[1], 0.0, 1.0)
    height = jnp.sqrt(up)
    sun = scene.light_position / jnp.linalg.norm(scene.light_position)
    toward = jnp.maximum(sum(direction[i] * sun[i] for i in range(3)), 0.0)
    glow = toward**32 * 0.35 + toward**512 * 1.5
    cover = jnp.clip(noise * 1.6, 0.0, 1.0) * scene.clouds[0] * jnp.clip(up * 6.0, 0.0, 1.0)
    zenith, horizon, cloud = scene.sky[0], scene.sky[1], scene.sky[2]
    out = []
    for i in range(3):
        base = horizon[i] + (zenith[i] - horizon[i]) * height
        out.append(base + (cloud[i] - base) * cover + glow * scene.light_color[i])
    return out


def _shade(scene: world.Scene, origin, direction, focal, samples):
    """Linear colour of rays (R,) from one origin, as three (R,) arrays."""
    t, surface = _nearest(scene, origin, direction)
    length = jnp.sqrt(direction[0] ** 2 + direction[1] ** 2 + direction[2] ** 2)
    view = [d / length for d in direction]
    point = [origin[i] + t * direction[i] for i in range(3)]
    is_sky = (surface < world.NUM_FACES) & (surface != world.FLOOR_FACE)
    is_sky = is_sky & (scene.family == world.OUTDOOR)
    local, unit, normal, axis, round_ = _surface_point(_surface_table(scene), surface, point)

    # One noise evaluation serves surfaces (body frame) and clouds (a plane overhead).
    scale = scene.grain[surface, 1]
    overhead = scene.clouds[1] / (jnp.abs(view[1]) + 0.25)
    shift = surface.astype(jnp.float32) * 7.31
    place = [
        jnp.where(is_sky, view[i] * overhead + 50.0, local[i] * scale + shift) for i in range(3)
    ]
    fine = [2.3 * p + 17.0 for p in place]
    coarse, detail = value_noise(*place), value_noise(*fine)
    seen = jnp.maximum(-sum(normal[i] * view[i] for i in range(3)), 0.12)
    spread = t / focal / samples / seen
    detail = detail * jnp.clip(1.5 - 4.0 * spread * scale, 0.0, 1.0)
    noise = coarse + 0.5 * detail
    grain = scene.grain[surface, 0] * noise * jnp.clip(1.5 - 2.0 * spread * scale, 0.0, 1.0)

    u, v = _pattern_position(scene, surface, unit, axis, round_)
    pattern = [scene.pattern[surface, i] for i in range(4)]
    footprint = spread * scene.cycles[surface]
    mix, tone = mix_factor(scene.texture[surface], u, v, pattern, noise, footprint)
    tone = tone * (1.0 + grain)

    # Without the barrier XLA's fusions compute the noise again for every colour channel.
    mix, tone, noise = jax.lax.optimization_barrier((mix, tone, noise))
    toward = [scene.light_position[i] - point[i] for i in range(3)]
    squared = toward[0] ** 2 + toward[1] ** 2 + toward[2] ** 2
    reach = jnp.sqrt(squared)
    toward = [v / reach for v in toward]
    facing = jnp.maximum(sum(normal[i] * toward[i] for i in range(3)), 0.0)
    lifted = [point[i] + _SHADOW_LIFT * normal[i] for i in range(3)]
    lit = _lit(scene, lifted, toward, reach) / (1.0 + scene.light_falloff * squared)
    half = [toward[i] - view[i] for i in range(3)]
    half_norm = jax.lax.rsqrt(half[0] ** 2 + half[1] ** 2 + half[2] ** 2 + 1e-6)
    shine = jnp.maximum(sum(normal[i] * half[i] for i in range(3)) * half_norm, 0.0)
    shine = scene.glow[surface, 1] * shine**32 * lit
    open_ = _openness(scene, point, normal, surface)
    fog = 1.0 - jnp.exp(-scene.haze * t * length)
    emission = scene.glow[surface, 0] * (1.0 - mix)
    sky = _sky_color(scene, view, noise)
    out = []
    for i in range(3):
        a, b = scene.color_a[surface, i], scene.color_b[surface, i]
        albedo = (a + (b - a) * mix) * tone
        light = scene.ambient[i] * open_ + scene.light_color[i] * facing * lit
        shaded = albedo * (light + emission) + shine * scene.light_color[i]
        shaded = shaded + (scene.sky[1, i] - shaded) * fog
        out.append(jnp.where(is_sky, sky[i], shaded))
    return out


def _openness(scene, point, normal, surface):
    """Ambient share in [0, 1]: darker near the floor line, room edges and on undersides."""
    height = -point[1]
    foot = 1.0 - 0.40 * jnp.exp(-height * 6.0) * (surface != world.FLOOR_FACE)
    walls = [point[i] - scene.room_min[i] for i in (0, 2)]
    walls += [scene.room_max[i] - point[i] for i in (0, 2)]
    edge = jnp.minimum(jnp.minimum(walls[0], walls[1]), jnp.minimum(walls[2], walls[3]))
    flat = (jnp.abs(normal[1]) > 0.5) & (surface < world.NUM_FACES)
    corner = 1.0 - 0.35 * jnp.exp(-jnp.maximum(edge, 0.0) * 3.5) * flat
    return (0.82 - 0.18 * normal[1]) * foot * corner


def _ray_grid(intrinsics, height, width, samples):
    """Camera-frame ray components of all samples of a frame, each (H * W * samples^2,)."""
    offset = (jnp.arange(samples) + 0.5) / samples - 0.5
    y = jnp.arange(height)[:, None, None, None] + offset[:, None]
    x = jnp.arange(width)[None, :, None, None] + offset
    shape = (height, width, samples, samples)
    ray_x = jnp.broadcast_to((x - intrinsics[2]) / intrinsics[0], shape).ravel()
    ray_y = jnp.broadcast_to((y - intrinsics[3]) / intrinsics[1], shape).ravel()
    return ray_x, ray_y


def _world_rays(pose, ray_x, ray_y):
    direction = [pose[i, 0] * ray_x + pose[i, 1] * ray_y + pose[i, 2] for i in range(3)]
    return [pose[i, 3] for i in range(3)], direction


def _through_lens(image):
    """Gaussian blur of `LENS` pixels: (H, W, 3) -> the same; the edge is continued outwards."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / LENS) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis, size in enumerate(image.shape[:2]):
        widths = [(2, 2) if i == axis else (0, 0) for i in range(3)]
        padded = jnp.pad(image, widths, mode="edge")
        shifted = [jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(5)]
        image = sum(tap * part for tap, part in zip(taps, shifted, strict=True))
    return image


@functools.partial(jax.jit, static_argnames=("height", "width", "samples", "batch"))
def _render(scene, c2w, intrinsics, height, width, samples, batch):
    ray_x, ray_y = _ray_grid(intrinsics, height, width, samples)

    def frame(pose):
        origin, direction = _world_rays(pose, ray_x, ray_y)
        color = jnp.stack(_shade(scene, origin, direction, intrinsics[0], samples), -1)
        color = color.reshape(height, width, samples * samples, 3)
        color = jnp.sqrt(_through_lens(jnp.clip(color, 0.0, 1.0).mean(2)))
        return jnp.round(255.0 * color).astype(jnp.uint8)

    return jax.lax.map(frame, c2w, batch_size=batch)


def _batch_size(frames: int) -> int | None:
    """Frames rendered at once: one on a CPU (cache), a divisor up to 8 on an accelerator."""
    if jax.default_backend() == "cpu":
        return None
    return max(n for n in range(1, 9) if frames % n == 0)


def render_async(scene, c2w, intrinsics, height=128, width=128, samples=2) -> jax.Array:
    """Like `render`, but returns the device array without waiting for it."""
    c2w = np.asarray(c2w, np.float32)
    intrinsics = np.asarray(intrinsics, np.float32)
    return _render(scene, c2w, intrinsics, height, width, samples, _batch_size(len(c2w)))


def render(scene, c2w, intrinsics, height=128, width=128, samples=2) -> np.ndarray:
    """Render frames.

    Args:
      scene: the scene.
      c2w: world poses (F, 4, 4), OpenCV axes.
      intrinsics: (fx, fy, cx, cy) in pixels; see the module head for the pixel convention.
      height, width: pixels.
      samples: rays a pixel along each axis.

    Returns:
      (F, H, W, 3) uint8.
    """
    return np.asarray(render_async(scene, c2w, intrinsics, height, width, samples))


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _depth(scene, c2w, intrinsics, height, width):
    ray_x, ray_y = _ray_grid(intrinsics, height, width, 1)

    def frame(pose):
        t, surface = _nearest(scene, *_world_rays(pose, ray_x, ray_y))
        is_sky = (surface < world.NUM_FACES) & (surface != world.FLOOR_FACE)
        is_sky = is_sky & (scene.family == world.OUTDOOR)
        return (
            jnp.where(is_sky, jnp.inf, t).reshape(height, width),
            surface.reshape(height, width),
        )

    return jax.lax.map(frame, c2w)


def depth(scene, c2w, intrinsics, height=128, width=128) -> tuple[np.ndarray, np.ndarray]:
    """Depth along the optical axis at pixel centres, and the surface seen there.

    Returns (depth (F, H, W) float32 world units, inf for sky; surface (F, H, W) int32: the row of
    the scene's material arrays).
    """
    c2w = np.asarray(c2w, np.float32)
    result = _depth(scene, c2w, np.asarray(intrinsics, np.float32), height, width)
    return np.asarray(result[0]), np.asarray(result[1])
