"""The first frame: from an image to an array with the model's size and value range."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sanawm_jax.runtime.errors import InputError

_LARGEST_SCALED = 50  # times the area of the crop; a strip of paper would need gigabytes
# Brands of ISO media files (after "ftyp") that hold a still picture which Pillow cannot read.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def load_image(value: Any) -> Image.Image:
    """Reads an image as RGB, upright.

    The orientation in the metadata is applied, transparency is removed, and more than 8 bits per
    channel are reduced to 8.

    Args:
      value: the path of a file, an open file, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3)
        or (H, W, 4) of uint8, of uint16, or of floating point in [0, 1].

    Raises:
      InputError: the file does not exist, is truncated, is too large or is not an image; or the
        values have no known range.
    """
    if isinstance(value, Image.Image):
        try:
            return _to_rgb(value, "image")
        except (OSError, SyntaxError) as error:  # Pillow decodes an opened file only now
            raise InputError(f"image: its file cannot be read ({error})") from error
    if isinstance(value, (str, os.PathLike)) or hasattr(value, "read"):
        return _read(value)
    return _from_array(value)


def resize_and_center_crop(
    image: Image.Image, height: int, width: int
) -> tuple[Image.Image, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Scales an image (Lanczos) until it covers height x width, then crops its centre.

    Args:
      image: any size.
      height, width: size of the crop in pixels.

    Returns:
      The crop, and (width, height) of the source, (width, height) after resizing and (left, top)
      of the crop, which `camera.intrinsics.crop_intrinsics` takes in this order. The result equals
      that of `resize_and_center_crop` of diffusers' SANA-WM pipeline.

    Raises:
      InputError: the image is so narrow that almost nothing of it would be in the crop.
    """
    src_size = image.size
    scale = max(height / src_size[1], width / src_size[0])
    resized_size = (max(width, round(src_size[0] * scale)), max(height, round(src_size[1] * scale)))
    if resized_size[0] * resized_size[1] > _LARGEST_SCALED * width * height:
        raise InputError(
            f"image: {src_size[0]}x{src_size[1]} pixels are too narrow for {width}x{height}; crop "
            "the image first"
        )
    left, top = (resized_size[0] - width) // 2, (resized_size[1] - height) // 2
    resized = image.resize(resized_size, Image.Resampling.LANCZOS)
    crop = resized.crop((left, top, left + width, top + height))
    return crop, src_size, resized_size, (left, top)


def to_array(image: Image.Image) -> np.ndarray:
    """Returns (H, W, 3) float32 in [-1, 1]; 0 maps to -1 and 255 to 1 (`VaeImageProcessor`)."""
    unit = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return 2 * unit - 1


def shown_size(path: str | os.PathLike) -> tuple[int, int]:
    """Returns (width, height) of an image file after its orientation is applied, from its header.

    Raises:
      InputError: as for `load_image`.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            is_turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (height, width) if is_turned else (width, height)
    # `load_image` says what is wrong, or knows a reader that Pillow has not loaded yet.
    except Exception:
        return load_image(path).size


def _read(source: Any) -> Image.Image:
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the open file"
    try:
        with Image.open(source) as file:
            return _to_rgb(file, str(name))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"image: there is no file {name}") from error
    except Image.DecompressionBombError as error:
        count, limit = (f"{int(n):,}" for n in re.findall(r"\d+", str(error))[:2])
        raise InputError(
            f"image: {name} has {count} pixels, more than {limit}; scale it down"
        ) from error
    # For damaged files, Pillow's decoders raise OSError, SyntaxError, ValueError and others.
    except Exception as error:
        if brand := _brand(source):
            return _read_heic(source, str(name), brand)
        raise InputError(f"image: cannot read {name} as an image (JPEG, PNG, WebP...)") from error


def _brand(source: Any) -> bytes:
    """Returns the brand of an ISO media file (HEIC, MP4), or nothing."""
    try:
        with open(source, "rb") as file:
            head = file.read(12)
    except (OSError, TypeError, ValueError):
        return b""
    return head[8:12] if head[4:8] == b"ftyp" else b""


def _read_heic(source: Any, name: str, brand: bytes) -> Image.Image:
    if brand not in _HEIC_BRANDS:
        raise InputError(
            f"image: {name} is a video, or a picture in a format that cannot be read; save one "
            "frame as JPEG or PNG"
        )
    try:
        from pillow_heif import HeifImagePlugin  # pyright: ignore[reportMissingImports] # noqa: F401
    except ImportError:
        raise InputError(
            f"image: {name} is a HEIC picture; convert it to JPEG or PNG, or install pillow-heif"
        ) from None
    try:
        with Image.open(source) as file:
            return _to_rgb(file, name)
    except Exception as error:
        raise InputError(f"image: {name} is a HEIC picture that is damaged") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if not image.width or not image.height:
        raise InputError(f"{name}: there are no pixels")
    # Pillow's own conversion clips these at 255 and would give a white or a black image.
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_to_bytes(np.asarray(image), name))
    return image.convert("RGB")


def _from_array(value: Any) -> Image.Image:
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not is_picture or not array.size or array.dtype.kind not in "iuf":
        raise InputError(
            f"image: an array of {array.dtype} {array.shape} is no picture; give a path, a PIL "
            "image, or (H, W, 3) of uint8 or of floats in [0, 1]"
        )
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        array = _to_bytes(array, "image")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Scales values to 0..255 by the smallest usual range that holds them.

    Raises:
      InputError: they are below 0, above 65535, or not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):
        raise InputError(
            f"{name}: pixels from {low:g} to {high:g} have no known range; save it with 8 bits"
        )
    if values.dtype.kind == "f" and high <= 1:
        return np.round(values * 255).astype(np.uint8)
    return (values / 256 if high > 255 else np.round(values)).astype(np.uint8)
