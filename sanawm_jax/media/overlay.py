"""The control overlay: key caps that light up while a key is held, and a map of the camera path.

Everything is drawn at the size of the video. Frames with a side below 256 pixels get small key caps
with letters from a table of pixels. Very small frames get only the parts that fit, and frames below
56 pixels get none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sanawm_jax.camera.poses import keys_from_poses, relative_to_first

_PANEL = (12, 14, 20, 150)
_RIM = (255, 255, 255, 80)
_LETTER = (255, 255, 255, 215)
_LIT = (255, 196, 61, 240)
_LIT_RIM = (255, 226, 150, 255)
_LIT_LETTER = (38, 26, 0, 255)
_AHEAD = (255, 255, 255, 140)
_OVERSAMPLE = 4  # shapes are drawn larger by this factor and then averaged, for smooth edges

# Column and row of each key. Columns 0 to 2 are the first group of keys, 3 to 5 the second.
_CAPS = {"w": (1, 0), "a": (0, 1), "s": (1, 1), "d": (2, 1)}
_CAPS |= {"i": (4, 0), "j": (3, 1), "k": (4, 1), "l": (5, 1)}

# Letters of 5x5 pixels, with one five-bit number per row.
_GLYPHS = {
    "w": (0b10001, 0b10001, 0b10101, 0b11011, 0b10001),
    "a": (0b01110, 0b10001, 0b11111, 0b10001, 0b10001),
    "s": (0b11111, 0b10000, 0b11111, 0b00001, 0b11111),
    "d": (0b11110, 0b10001, 0b10001, 0b10001, 0b11110),
    "i": (0b01110, 0b00100, 0b00100, 0b00100, 0b01110),
    "j": (0b00111, 0b00010, 0b00010, 0b10010, 0b01100),
    "k": (0b10010, 0b10100, 0b11000, 0b10100, 0b10010),
    "l": (0b10000, 0b10000, 0b10000, 0b10000, 0b11111),
}


@dataclass(frozen=True)
class OverlayLayout:
    """Sizes and positions in pixels, computed from the size of the frame.

    Attributes:
      cap: side of a key cap; 0 draws none.
      gap: space between caps; the space between the two groups is twice this plus half a cap.
      margin: space to the edges of the frame.
      map_side: side of the square map; 0 draws none.
      has_glyphs: letters come from the 5x5 table instead of a font; caps below 7 have no letters.
    """

    cap: int
    gap: int
    margin: int
    map_side: int
    has_glyphs: bool

    @classmethod
    def for_frame(cls, height: int, width: int) -> OverlayLayout:
        """Chooses sizes that fit a height x width frame."""
        side = min(height, width)
        if side >= 256:
            cap = round(side / 17)
            return cls(cap, max(2, cap // 9), round(0.6 * cap), round(3.6 * cap), False)
        cap = 9 if side >= 112 else 7 if side >= 88 else 5 if side >= 56 else 0
        margin = 3 if side >= 88 else 2
        layout = cls(cap, 1, margin, 0, True)
        room = width - layout.keys_size[0] - 3 * margin
        map_side = min(room, round(0.28 * side))
        return cls(cap, 1, margin, map_side if cap and map_side >= 12 else 0, True)

    @property
    def keys_size(self) -> tuple[int, int]:
        """Width and height of both groups of keys together."""
        if not self.cap:
            return 0, 0
        x, y = self.cap_corner("l")
        return x + self.cap, y + self.cap

    def cap_corner(self, key: str) -> tuple[int, int]:
        """Left and top of a cap, relative to the left and top of the two groups."""
        column, row = _CAPS[key]
        pitch = self.cap + self.gap
        split = (column >= 3) * (self.gap + self.cap // 2)
        return column * pitch + split, row * pitch


class OverlayPainter:
    """Draws the overlay frame by frame, for videos that arrive as a stream.

    Args:
      c2w: (F, 4, 4) camera-to-world poses of the F frames.
      held_keys: the keys that move frame n to frame n + 1, as `parse_actions` returns them; they
        light up on frame n + 1. Missing entries count as no key, and extra entries are ignored.
        None infers the keys from the poses.
      height, width: size of the frames.
      mapping: the meaning of the keys when they are inferred, see `camera.actions`.
    """

    def __init__(
        self,
        c2w: np.ndarray,
        held_keys: list[frozenset[str]] | None,
        height: int,
        width: int,
        mapping: str = "sana",
    ):
        self.height, self.width = height, width
        self.layout = OverlayLayout.for_frame(height, width)
        self.held_keys = keys_from_poses(c2w, mapping) if held_keys is None else held_keys
        self.caps = {
            (key, lit): _draw_cap(key, lit, self.layout)
            for key in _CAPS
            for lit in (False, True)
            if self.layout.cap
        }
        if self.layout.map_side:
            self.map = _PathMap(relative_to_first(c2w), self.layout.map_side)

    def paint(self, frame: np.ndarray, index: int) -> np.ndarray:
        """Returns a copy of frame number `index`, (H, W, 3) uint8, with the overlay drawn on it.

        Raises:
          ValueError: the frame has the wrong size or dtype.
        """
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"expected uint8 ({self.height}, {self.width}, 3), got {frame.dtype} {frame.shape}"
            )
        picture = Image.fromarray(np.ascontiguousarray(frame))
        layout = self.layout
        held = self.held_keys[index - 1] if 0 < index <= len(self.held_keys) else frozenset()
        top = self.height - layout.margin - layout.keys_size[1]
        for key in _CAPS if layout.cap else ():
            x, y = layout.cap_corner(key)
            sprite = self.caps[key, key in held]
            picture.paste(sprite, (layout.margin + x, top + y), sprite)
        if layout.map_side:
            sprite = self.map.draw(index)
            corner = layout.margin + layout.map_side
            picture.paste(sprite, (self.width - corner, self.height - corner), sprite)
        return np.array(picture)

    def paint_all(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields painted frames; the first one is frame 0."""
        for index, frame in enumerate(frames):
            yield self.paint(frame, index)


def draw_overlay(
    frames: np.ndarray,
    c2w: np.ndarray,
    held_keys: list[frozenset[str]] | None = None,
    mapping: str = "sana",
) -> np.ndarray:
    """Draws key caps and a map of the path on every frame.

    The map shows the path from above (x to the right, z up, in the axes of the first camera). The
    finished part of the path has a colour, and a wedge shows the heading of the camera.

    Args:
      frames: (F, H, W, 3) uint8; they are not changed.
      c2w: (F, 4, 4) camera-to-world poses.
      held_keys, mapping: as for `OverlayPainter`.

    Returns:
      (F, H, W, 3) uint8.

    Raises:
      ValueError: there are not as many frames as poses, or the frames are not uint8.
    """
    if len(frames) != len(c2w):
        raise ValueError(f"{len(frames)} frames need as many poses, got {len(c2w)}")
    height, width = frames.shape[1:3]
    painter = OverlayPainter(c2w, held_keys, height, width, mapping)
    painted = np.empty_like(frames)
    for index, frame in enumerate(painter.paint_all(frames)):
        painted[index] = frame
    return painted


def _draw_cap(key: str, is_lit: bool, layout: OverlayLayout) -> Image.Image:
    fill, rim = (_LIT, _LIT_RIM) if is_lit else (_PANEL, _RIM)
    letter = _LIT_LETTER if is_lit else _LETTER
    if layout.has_glyphs:
        return _draw_compact_cap(key, layout.cap, fill, letter)
    cap, scale = layout.cap, _OVERSAMPLE
    image = Image.new("RGBA", (cap * scale, cap * scale))
    ImageDraw.Draw(image).rounded_rectangle(
        (0, 0, cap * scale - 1, cap * scale - 1),
        radius=round(0.2 * cap * scale),
        fill=fill,
        outline=rim,
        width=max(scale, round(0.04 * cap * scale)),
    )
    image = image.resize((cap, cap), Image.Resampling.BOX)
    text = Image.new("RGBA", image.size, (*letter[:3], 0))
    ImageDraw.Draw(text).text(
        (cap / 2, cap / 2), key.upper(), letter, ImageFont.load_default(0.56 * cap), anchor="mm"
    )
    return Image.alpha_composite(image, text)


def _draw_compact_cap(key: str, cap: int, fill: tuple, letter: tuple) -> Image.Image:
    pixels = np.empty((cap, cap, 4), dtype=np.uint8)
    pixels[:] = fill
    pixels[[0, 0, -1, -1], [0, -1, 0, -1], 3] //= 4  # rounds the corners
    if cap >= 7:
        bits = np.array([[row >> (4 - x) & 1 for x in range(5)] for row in _GLYPHS[key]], bool)
        inset = (cap - 5) // 2
        pixels[inset : inset + 5, inset : inset + 5][bits] = letter
    return Image.fromarray(pixels)


class _PathMap:
    """A square top view of a path; `draw(index)` draws it for one frame."""

    def __init__(self, c2w: np.ndarray, side: int):
        self.side = side
        self.canvas = side * _OVERSAMPLE
        ground = c2w[:, [0, 2], 3].astype(np.float64)
        low, high = ground.min(axis=0), ground.max(axis=0)
        # A camera that only turns is drawn as a dot in the middle.
        extent = max((high - low).max(), 1e-6)
        inner = 0.68 * self.canvas
        centred = (ground - (low + high) / 2) / extent * inner
        self.points = self.canvas / 2 + centred * [1, -1]
        # A camera that looks straight up or down has no horizontal heading. Its right axis gives
        # one.
        ahead, aside = c2w[:, [0, 2], 2], c2w[:, [2, 0], 0] * [-1, 1]
        is_steep = np.linalg.norm(ahead, axis=1, keepdims=True) < 1e-3
        heading = np.where(is_steep, aside, ahead) * [1, -1]
        self.headings = heading / np.maximum(np.linalg.norm(heading, axis=1, keepdims=True), 1e-6)
        self.line = max(1.4 if side < 64 else 2.0, side / 46) * _OVERSAMPLE
        self.base = self._draw_base()

    def _draw_base(self) -> Image.Image:
        image = Image.new("RGBA", (self.canvas, self.canvas))
        edge = self.canvas - 1
        is_small = self.side < 64
        ImageDraw.Draw(image).rounded_rectangle(
            (0, 0, edge, edge),
            radius=(2 * _OVERSAMPLE if is_small else round(0.09 * self.canvas)),
            fill=_PANEL,
            outline=None if is_small else _RIM,
            width=0 if is_small else _OVERSAMPLE,
        )
        self._line(image, self.points, _AHEAD, 0.7 * self.line)
        return image

    def draw(self, index: int) -> Image.Image:
        image = self.base.copy()
        index = min(index, len(self.points) - 1)
        self._line(image, self.points[: index + 1], _LIT, self.line, start=1.8 * self.line)
        here, ahead = self.points[index], self.headings[index]
        aside = np.array([-ahead[1], ahead[0]])
        size = max(4.2 * _OVERSAMPLE, 0.075 * self.canvas)
        # The corners of an arrowhead: tip, one tail, the notch between the tails, the other tail.
        corners = [(1.25, 0), (-0.8, 0.85), (-0.35, 0), (-0.8, -0.85)]
        outline = [tuple(here + size * (x * ahead + y * aside)) for x, y in corners]
        ImageDraw.Draw(image).polygon(outline, fill=(255, 255, 255, 255))
        return image.resize((self.side, self.side), Image.Resampling.BOX)

    def _line(
        self,
        image: Image.Image,
        points: np.ndarray,
        colour: tuple,
        width: float,
        start: float | None = None,
    ) -> None:
        """Blends a line with round ends over the image; `start` is the width of its first dot."""
        layer = Image.new("L", image.size)
        draw = ImageDraw.Draw(layer)
        draw.line([tuple(p) for p in points], 255, round(width), joint="curve")
        for (x, y), size in ((points[-1], width), (points[0], start or width)):
            r = size / 2
            draw.ellipse((x - r, y - r, x + r, y + r), 255)
        ink = Image.new("RGBA", image.size, colour)
        ink.putalpha(layer.point(lambda v: v * colour[3] // 255))
        image.alpha_composite(ink)
