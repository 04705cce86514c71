"""The control overlay in the look of NVlabs/Sana: keys W A S D, and a stick for the camera's turns.

Everything comes from the poses. A key shows a step along its axis, so A and D show strafing
whatever key caused it, and the stick shows yaw and pitch.

Source: the overlay of NVlabs/Sana's SANA-WM of June 2026. Sizes, colours and thresholds are its
numbers; the tests compare the result with pictures that it made.

Axis letters: F frames, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_KEYS = "wasd"
_CAPS = {"w": (1, 0), "a": (0, 1), "s": (1, 1), "d": (2, 1)}  # column, row
_LEAST_STEP = 0.005  # smaller steps than this never count as a key
_KEY_SHARE = 0.30  # of the 95th percentile of the steps along an axis
_LEAST_TURN = 0.5  # degrees per frame that push the stick fully, at least
_SMOOTHING = 0.35  # weight of the new frame in the moving average of the stick
_TRIANGLE = 0.55  # of a triangle's half width: how far tip and base are from its middle
_SHADOW = 8  # pixels by which a shadow is larger than what throws it
_TRIANGLES = {(0, -1): -1, (0, 1): 1, (-1, 0): -1, (1, 0): 1}  # direction -> sign that lights it


class UpstreamMotion(NamedTuple):
    """What the overlay shows.

    Attributes:
      keys: (F, 4) bool, W A S D.
      yaw, pitch: (F,) in [-1, 1], smoothed.
    """

    keys: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray


def upstream_motion(c2w: np.ndarray) -> UpstreamMotion:
    """Keys and stick of every frame: the motion to the next one; the last frame repeats.

    Args:
      c2w: (F, 4, 4) camera to world.
    """
    from scipy.spatial.transform import Rotation

    poses = np.asarray(c2w, np.float64)
    if len(poses) < 2:
        return UpstreamMotion(np.zeros((len(poses), 4), bool), *np.zeros((2, len(poses))))
    steps = np.linalg.inv(poses[:-1]) @ poses[1:]
    aside, ahead = steps[:, 0, 3], steps[:, 2, 3]
    least_aside, least_ahead = (
        max(_LEAST_STEP, _KEY_SHARE * np.percentile(np.abs(along), 95)) for along in (aside, ahead)
    )
    keys = (ahead > least_ahead, aside < -least_aside, ahead < -least_ahead, aside > least_aside)
    turns = Rotation.from_matrix(steps[:, :3, :3]).as_euler("YXZ", degrees=True)[:, :2]
    stick = np.zeros((len(turns), 2))
    for axis in range(2):
        scale = max(_LEAST_TURN, np.percentile(np.abs(turns[:, axis]), 95))
        value = 0.0
        for i, turn in enumerate(turns[:, axis]):
            value += _SMOOTHING * (np.clip(turn / scale, -1, 1) - value)
            stick[i, axis] = value
    held, stick = (np.concatenate((a, a[-1:])) for a in (np.stack(keys, 1), stick))
    return UpstreamMotion(held, stick[:, 0], stick[:, 1])


class UpstreamPainter:
    """Draws upstream's overlay frame by frame, for videos that arrive as a stream.

    Args:
      c2w: (F, 4, 4) camera to world.
      height, width: size of the frames.
    """

    def __init__(self, c2w: np.ndarray, height: int, width: int):
        self.height, self.width = height, width
        self.motion = upstream_motion(c2w)
        self._key = int(max(32, 0.08 * height))
        self._gap = int(max(4, 0.15 * self._key))
        margin = int(0.05 * height)
        self._left = margin
        self._top = height - margin - 2 * self._key - self._gap
        self._font = _bold_font(int(0.5 * self._key))
        columns, rows = 3 * self._key + 2 * self._gap, 2 * self._key + self._gap
        self._panel = (self._left, self._top, self._left + columns, self._top + rows)
        self._radius = int(max(30, 0.47 * rows))
        self._centre = (
            self._left + columns + self._key + self._radius,
            self._top + rows // 2,
        )
        self._shadows = _shadow(
            (width, height), self._panel, max(4, 0.2 * self._key), max(7, 0.18 * self._key)
        )

    def paint(self, frame: np.ndarray, index: int) -> np.ndarray:
        """Returns a copy of frame number `index`, (H, W, 3) uint8, with the overlay drawn on it.

        Raises:
          ValueError: the frame has the wrong size or dtype.
        """
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"expected uint8 ({self.height}, {self.width}, 3), got {frame.dtype} {frame.shape}"
            )
        index = min(index, len(self.motion.yaw) - 1)
        picture = Image.fromarray(np.ascontiguousarray(frame)).convert("RGBA")
        picture.alpha_composite(self._shadows)
        picture.alpha_composite(self._draw_keys(self.motion.keys[index]))
        stick = (float(self.motion.yaw[index]), float(self.motion.pitch[index]))
        picture.alpha_composite(self._draw_stick(*stick))
        return np.array(picture.convert("RGB"))

    def paint_all(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields painted frames; the first one is frame 0."""
        for index, frame in enumerate(frames):
            yield self.paint(frame, index)

    def _draw_keys(self, held: np.ndarray) -> Image.Image:
        layer = Image.new("RGBA", (self.width, self.height))
        draw = ImageDraw.Draw(layer)
        key = self._key
        for name, is_held in zip(_KEYS, held, strict=True):
            column, row = _CAPS[name]
            x = self._left + column * (key + self._gap)
            y = self._top + row * (key + self._gap)
            fill, rim, ink = (
                ((255, 255, 255, 200), (255, 255, 255, 255), (0, 0, 0, 220))
                if is_held
                else ((0, 0, 0, 100), (255, 255, 255, 60), (255, 255, 255, 180))
            )
            draw.rounded_rectangle(
                (x, y, x + key - 1, y + key - 1),
                radius=max(4, int(0.2 * key)),
                fill=fill,
                outline=rim,
                width=max(1, int(0.03 * key)),
            )
            left, top, right, bottom = draw.textbbox((0, 0), name.upper(), font=self._font)
            place = (x + (key - right + left + 1) // 2, y + (key - bottom + top) // 2 - 2)
            draw.text(place, name.upper(), fill=ink, font=self._font)
        return layer

    def _draw_stick(self, yaw: float, pitch: float) -> Image.Image:
        (x, y), r = self._centre, self._radius
        reach = r + 14
        layer = Image.new("RGBA", (self.width, self.height))
        ImageDraw.Draw(layer).ellipse(_around(x, y, reach), fill=(0, 0, 0, 88))
        layer = layer.filter(ImageFilter.GaussianBlur(max(8, 0.16 * r)))
        draw = ImageDraw.Draw(layer)
        white = (255, 255, 255)
        draw.ellipse(_around(x, y, r + 7), outline=(*white, 42), width=max(1, int(0.025 * r)))
        draw.ellipse(
            _around(x, y, r),
            fill=(7, 9, 13, 104),
            outline=(*white, 95),
            width=max(1, int(0.035 * r)),
        )
        for dx, dy in ((1, 0), (0, 1)):
            arm = 0.63 * r
            draw.line((x - arm * dx, y - arm * dy, x + arm * dx, y + arm * dy), (*white, 56))
        size = max(7, 0.16 * r)
        for (dx, dy), sign in _TRIANGLES.items():
            value = (yaw if dx else pitch) * sign
            along = [0.78 * r + k * _TRIANGLE * size for k in (1, -1, -1)]
            corners = [
                (x + dx * far + k * dy * size, y + dy * far + k * dx * size)
                for far, k in zip(along, (0, -1, 1), strict=True)
            ]
            draw.polygon(corners, fill=(*white, 210 if value > 0.08 else 72))
        knob = (int(x + 0.48 * r * yaw), int(y + 0.48 * r * pitch))
        glow = Image.new("RGBA", layer.size)
        shine = ImageDraw.Draw(glow)
        shine.line((x, y, *knob), (*white, 78), max(1, int(0.055 * r)))
        shine.ellipse(_around(*knob, 0.22 * r), fill=(*white, 110))
        layer.alpha_composite(glow.filter(ImageFilter.GaussianBlur(max(5, 0.09 * r))))
        draw = ImageDraw.Draw(layer)
        draw.line((x, y, *knob), (*white, 120), max(1, int(0.025 * r)))
        radius = max(7, int(0.13 * r))
        draw.ellipse(_around(*knob, radius), fill=(*white, 230), outline=(*white, 255))
        draw.ellipse(_around(*knob, max(3, int(0.36 * radius))), fill=(20, 24, 30, 170))
        return layer


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _shadow(
    size: tuple[int, int], panel: tuple[int, int, int, int], corner: float, blur: float
) -> Image.Image:
    """The blurred shadow behind a panel."""
    layer = Image.new("RGBA", size)
    left, top, right, bottom = panel
    box = (left - _SHADOW, top - _SHADOW, right + _SHADOW, bottom + _SHADOW)
    ImageDraw.Draw(layer).rounded_rectangle(box, radius=corner + _SHADOW, fill=(0, 0, 0, 74))
    return layer.filter(ImageFilter.GaussianBlur(blur))


def _bold_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans Bold from the system or from matplotlib, or else Pillow's own font."""
    name = "DejaVuSans-Bold.ttf"
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        pass
    try:
        from matplotlib import get_data_path

        return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}", size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)
