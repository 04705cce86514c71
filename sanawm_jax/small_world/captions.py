"""Captions of small-world scenes, deterministic, from a closed vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from sanawm_jax.small_world.palette import COLOR_NAMES, TEXTURES

if TYPE_CHECKING:
    from sanawm_jax.small_world.scene import Scene

# Object kinds as caption words; scenes store the index.
KINDS = (
    "table",
    "sofa",
    "cabinet",
    "shelf",
    "bed",
    "column",
    "lamp",
    "ball",
    "stool",
    "crate",
    "plant",
    "vase",
    "rug",
    "picture",
    "window",
    "house",
    "tower",
    "tree",
    "lantern",
    "fence",
    "hill",
    "street",
)
_PLURALS = {"shelf": "shelves"}
_COUNTS = (
    "",
    "a",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)

_INDOOR = (
    "A room with {wall} walls and a {floor} floor. {There} {objects}.",
    "An indoor view of {objects}. The walls are {wall} and the floor is {floor}.",
    "Inside a room with {wall} walls, a {ceiling} ceiling and a {floor} floor, with {objects}.",
    "{Objects} in a room. It has {wall} walls above a {floor} floor.",
    "A bright interior: {objects}, {wall} walls, a {floor} floor and a {ceiling} ceiling.",
    "The camera moves through a room with a {floor} floor and {wall} walls, past {objects}.",
)
_OUTDOOR = (
    "An outdoor scene with {objects} on {floor} ground under a {sky} sky.",
    "A toy town under a {sky} sky. {There} {objects} on the {floor} ground.",
    "{Objects} stand on {floor} ground, and the sky is {sky}.",
    "A small block with {objects}. The ground is {floor} and the sky above is {sky}.",
    "The camera moves past {objects} on {floor} ground below a {sky} sky with soft clouds.",
    "Outside in the sun: {objects}, {floor} ground and a wide {sky} sky.",
)
_ALSO = ("and", "s", "is", "are", "here", "there", "an", "one")


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text).lower()))


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, noun + "s")


VOCABULARY = frozenset(
    set().union(
        *map(_words, _INDOOR + _OUTDOOR),
        _COUNTS[1:],
        _ALSO,
        KINDS,
        COLOR_NAMES,
        TEXTURES,
    )
    | {_plural(kind) for kind in KINDS}
)


def object_names(scene: Scene) -> list[tuple[str, str]]:
    """List (colour, kind) of the scene's captioned objects."""
    return [(COLOR_NAMES[c], KINDS[k]) for k, c in scene.objects if k >= 0]


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _listing(rng: np.random.Generator, scene: Scene, limit: int) -> str:
    """Join up to `limit` kinds of objects: "two green trees, a red house and an orange ball"."""
    counts = Counter(object_names(scene))
    names = list(counts)
    keep = sorted(rng.permutation(len(names))[:limit])
    parts = []
    for colour, kind in (names[i] for i in keep):
        count = counts[colour, kind]
        if count == 1:
            parts.append(_with_article(f"{colour} {kind}"))
        else:
            parts.append(f"{_COUNTS[min(count, 10)]} {colour} {_plural(kind)}")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    """Describe a scene in one or two sentences; the same scene gives the same text."""
    rng = np.random.default_rng([int(scene.seed), 0xCA9])
    wall, floor, ceiling = (
        # A plain surface is named by its colour alone.
        COLOR_NAMES[c] if TEXTURES[t] == "plain" else f"{COLOR_NAMES[c]} {TEXTURES[t]}"
        for t, c in scene.surfaces
    )
    objects = _listing(rng, scene, int(rng.integers(3, 6)))
    templates = _INDOOR if scene.family == 0 else _OUTDOOR
    template = templates[rng.integers(len(templates))]
    # "a {floor}" becomes "an orange"
    text = re.sub(
        r"\ba \{(\w+)\}",
        lambda m: _with_article({"floor": floor, "ceiling": ceiling, "sky": ceiling}[m[1]]),
        template,
    )
    there = "There is" if objects.split()[0] in ("a", "an") else "There are"
    values = {
        "wall": wall,
        "floor": floor,
        "ceiling": ceiling,
        "sky": ceiling,
        "objects": objects,
    }
    return text.format(**values, There=there, Objects=objects[0].upper() + objects[1:])
