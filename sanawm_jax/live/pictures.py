"""JPEGs of frames: simplejpeg, or Pillow where it is not installed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

QUALITY = 90
THUMBNAIL = 96  # pixels of the longer side


def to_jpeg(frame: np.ndarray, quality: int = QUALITY) -> bytes:
    """Encodes a frame (H, W, 3) uint8."""
    if simplejpeg is not None:
        return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality, colorsubsampling="444")
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def from_jpeg(data: bytes) -> np.ndarray:
    """Decodes a JPEG to (H, W, 3) uint8."""
    if simplejpeg is not None:
        return simplejpeg.decode_jpeg(data)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def thumbnail(frame: np.ndarray) -> bytes:
    """A small JPEG of a frame (H, W, 3) uint8."""
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return to_jpeg(np.asarray(picture), 80)
