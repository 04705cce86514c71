"""The first frame: from an image file to an array with the model's size and value range."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

from sanawm_jax.runtime.errors import InputError


def load_image(path: str | os.PathLike) -> Image.Image:
    """Reads an image file as RGB, upright.

    The orientation in the file's metadata is applied, transparency is removed, and 16-bit grey is
    scaled to 8 bits.

    Raises:
      InputError: the file does not exist, is truncated, is too large or is not an image.
    """
    path = os.fspath(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):
                # Pillow's own conversion clips at 255 and would give a white image.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"image: there is no file {path}") from error
    # For damaged files, Pillow's decoders raise OSError, SyntaxError, ValueError and others.
    except Exception as error:
        raise InputError(f"image: cannot read {path} as an image (JPEG, PNG, WebP...)") from error


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
    """
    src_size = image.size
    scale = max(height / src_size[1], width / src_size[0])
    resized_size = (max(width, round(src_size[0] * scale)), max(height, round(src_size[1] * scale)))
    left, top = (resized_size[0] - width) // 2, (resized_size[1] - height) // 2
    resized = image.resize(resized_size, Image.Resampling.LANCZOS)
    crop = resized.crop((left, top, left + width, top + height))
    return crop, src_size, resized_size, (left, top)


def to_array(image: Image.Image) -> np.ndarray:
    """Returns (H, W, 3) float32 in [-1, 1]; 0 maps to -1 and 255 to 1 (`VaeImageProcessor`)."""
    unit = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return 2 * unit - 1
