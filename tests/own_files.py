"""Files as people have them: films, folders of images and cameras, all of one small scene."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

N, WIDTH, HEIGHT = 9, 48, 32
K = [40.0, 40.0, 24.0, 16.0]


def picture(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Four colours: reddish on the left, yellowish at the top left."""
    y, x = np.mgrid[:height, :width]
    red, green = np.where(x < width // 2, 220, 20), np.where(y < height // 2, 200, 10)
    return np.stack([red, green, 240 - red], -1).astype(np.uint8)


def film(
    path: Path,
    frames: int = N,
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    rate: int = 16,
    aspect: int = 1,
) -> Path:
    """Writes a film in the container of its ending; `aspect` is the width of a pixel in heights."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(width, height), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_matrix(path: Path, matrix: Sequence[int]) -> None:
    """Sets how players show an MP4: a b c d of its display matrix."""
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    a, b, c, d = (v * 65536 for v in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def straight(frames: int = N) -> np.ndarray:
    """(frames, 4, 4): the camera moves ahead by 0.05 per frame."""
    c2w = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    c2w[:, 2, 3] = 0.05 * np.arange(frames)
    return c2w


def npz(path: Path, frames: int = N, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, c2w=straight(frames), **more)  # pyright: ignore[reportArgumentType]
    return path


def images(folder: Path, names: Sequence[str], **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(picture()).save(folder / name, **options)  # pyright: ignore
    return folder


def transforms(folder: Path, names: Sequence[str], **more: object) -> Path:
    """Writes a transforms.json whose n-th name has the n-th pose of `straight`."""
    frames = []
    for number, name in enumerate(names):
        matrix = np.eye(4)
        matrix[2, 3] = 0.05 * number
        frames.append({"file_path": name, "transform_matrix": matrix.tolist()})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "transforms.json"
    file.write_text(json.dumps({**more, "frames": frames}), encoding="utf-8")
    return file
