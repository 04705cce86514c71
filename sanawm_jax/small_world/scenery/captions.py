"""Captions of what a clip really shows, deterministic, from a closed vocabulary."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from sanawm_jax.small_world.scenery.palette import COLOR_NAMES, TEXTURE_NAMES
from sanawm_jax.small_world.scenery.scene import PLACES, Scene
from sanawm_jax.small_world.scenery.shapes import cast
from sanawm_jax.small_world.scenery.words import KINDS, PLURALS, SKY_NAMES

_COUNTS = ("", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLACE_WORDS = {
    "village": "a village",
    "ruins": "old ruins",
    "garden": "a garden",
    "winter": "a winter village",
    "shore": "a beach",
    "shrine": "a shrine",
    "room": "a room",
    "hall": "a hall",
}
_SKY_WORDS = {
    "clear": "a clear blue sky",
    "cloudy": "a cloudy sky",
    "golden": "a golden evening sky",
    "pink": "a pink sky",
    "turquoise": "a bright turquoise sky",
    "dusk": "a dark sky at dusk",
    "gray": "a gray sky",
}
_OUTDOOR = (
    "{Place} under {sky}. {There} {objects} on the {floor} ground.",
    "{Place} with {objects}, {floor} ground and {sky}.",
    "The camera moves through {place} under {sky}, past {objects}.",
    "{Objects} in {place}. The ground is {floor}, with {sky} above.",
)
_INDOOR = (
    "{Place} with {wall} walls and a {floor} floor. {There} {objects}.",
    "Inside {place} with {objects}. The walls are {wall} and the floor is {floor}.",
    "The camera moves through {place} with {wall} walls, past {objects}.",
    "{Objects} in {place} with sunlight on a {floor} floor and {wall} walls.",
)
_GRID = (28, 17)  # rays across and up that look for objects
_LEAST = 3  # rays of a frame that an object has to fill to be named


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text).lower()))


def _plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


VOCABULARY = frozenset(
    set().union(
        *map(_words, (*_OUTDOOR, *_INDOOR, *_PLACE_WORDS.values(), *_SKY_WORDS.values())),
        _COUNTS[1:],
        ("and", "is", "are", "there", "an", "one", "more"),
        KINDS,
        map(_plural, KINDS),
        COLOR_NAMES,
        TEXTURE_NAMES,
    )
)


def object_names(scene: Scene) -> list[tuple[str, str]]:
    """(colour, kind) of all objects of the scene."""
    return [(COLOR_NAMES[c], KINDS[k]) for k, c in scene.objects if k >= 0]


def visible_objects(scene: Scene, c2w: np.ndarray, intrinsics: np.ndarray) -> dict[int, float]:
    """Objects in sight and the largest share of a picture that each fills.

    Args:
      c2w: (F, 4, 4) poses; a handful of them is looked at.
      intrinsics: (fx, fy, cx, cy); the picture is 2 cx wide and 2 cy high.
    """
    picked = c2w[np.unique(np.linspace(0, len(c2w) - 1, min(len(c2w), 7)).astype(int))]
    fx, fy, cx, cy = (float(v) for v in intrinsics)
    x, y = np.meshgrid(
        (np.arange(_GRID[0]) + 0.5) / _GRID[0] * 2 * cx,
        (np.arange(_GRID[1]) + 0.5) / _GRID[1] * 2 * cy,
    )
    rays = np.stack(((x.ravel() - cx) / fx, (y.ravel() - cy) / fy, np.ones(x.size)), -1)
    found: dict[int, float] = {}
    for pose in picked:
        directions = rays @ pose[:3, :3].T
        depth, body = cast(scene, np.broadcast_to(pose[:3, 3], directions.shape), directions)
        things = np.where((body >= 0) & (depth < 25.0), scene.body_object[body], -1)
        patch = _patch_objects(scene, pose[:3, 3] + depth[:, None] * directions)
        things = np.where((body < 0) & (depth < 25.0), patch, things)
        for index, count in Counter(things.tolist()).items():
            if index >= 0 and count >= _LEAST:
                found[index] = max(found.get(index, 0.0), count / len(things))
    return found


def _patch_objects(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Objects that are flat areas on the ground, by points on it, (N,) index or -1."""
    out = np.full(len(points), -1)
    for (x, z, half_x, half_z, yaw, is_round), thing in zip(
        scene.patches, scene.patch_object, strict=True
    ):
        if half_x <= 0 or thing < 0:
            continue
        dx, dz = points[:, 0] - x, points[:, 2] - z
        u = np.abs(np.cos(yaw) * dx - np.sin(yaw) * dz) / half_x
        v = np.abs(np.sin(yaw) * dx + np.cos(yaw) * dz) / half_z
        inside = (np.hypot(u, v) if is_round > 0.5 else np.maximum(u, v)) < 1.0
        out = np.where(inside & (np.abs(points[:, 1]) < 1e-2), thing, out)
    return out


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _listing(names: list[tuple[str, str]], limit: int) -> str:
    """Names up to `limit` kinds: "two green trees, a red house and an orange lantern"."""
    counts = Counter(names)
    parts = []
    for (color, kind), count in list(counts.items())[:limit]:
        if count == 1:
            parts.append(_with_article(f"{color} {kind}"))
        else:
            parts.append(f"{_COUNTS[min(count, 10)]} {color} {_plural(kind)}")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(
    scene: Scene, c2w: np.ndarray | None = None, intrinsics: np.ndarray | None = None
) -> str:
    """Describes a clip in one or two sentences; the same clip gives the same text.

    Args:
      scene: the scene.
      c2w: (F, 4, 4) the clip's poses: only what they show is named, the largest first. Without
        them every object of the scene counts as seen.
      intrinsics: (4,) of the clip, with `c2w`.
    """
    rng = np.random.default_rng([int(scene.seed), 0xCA9])
    names = object_names(scene)
    if c2w is not None and intrinsics is not None:
        seen = visible_objects(scene, np.asarray(c2w), np.asarray(intrinsics))
        names = [names[i] for i in sorted(seen, key=lambda i: -seen[i])]
    names = [n for n in names if n[1] not in ("hill",)] or names
    floor, wall, texture, sky = (int(v) for v in scene.words)
    floor_words = COLOR_NAMES[floor]
    if TEXTURE_NAMES[texture] != "plain":
        floor_words = f"{floor_words} {TEXTURE_NAMES[texture]}"
    templates = _INDOOR if scene.is_indoor else _OUTDOOR
    template = templates[rng.integers(len(templates))]
    template = re.sub(
        r"\ba \{floor\}",
        lambda m: _with_article(floor_words).replace(floor_words, "{floor}"),
        template,
    )
    objects = _listing(names, int(rng.integers(3, 6))) if names else "more ground"
    place = _PLACE_WORDS[PLACES[int(scene.place)]]
    first = objects.split()[0]
    return template.format(
        place=place,
        Place=place[0].upper() + place[1:],
        objects=objects,
        Objects=objects[0].upper() + objects[1:],
        There="There is" if first in ("a", "an", "more") else "There are",
        floor=floor_words,
        wall=COLOR_NAMES[wall],
        sky=_SKY_WORDS[SKY_NAMES[sky]],
    )
