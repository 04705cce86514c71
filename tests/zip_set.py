"""A small set of zip latents with random contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from sanawm_jax.data.zip_writer import ZipSample, write_zip_latents

SHAPE = (3, 2, 4, 5)  # F H W C
FRAMES = 17
SIZE = (64, 48)  # width, height


def random_path(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Returns (frames, 4, 4) float32 poses of a rotating and moving camera, far from the origin."""
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, :3, :3] = Rotation.from_rotvec(
        np.cumsum(rng.normal(0, 0.03, (frames, 3)), 0)
    ).as_matrix()
    c2w[:, :3, 3] = rng.normal(0, 5, 3) + np.cumsum(rng.normal(0, 0.1, (frames, 3)), 0)
    return c2w.astype(np.float32)


def make_sample(key: str, seed: int, **over: object) -> ZipSample:
    """Returns a sample whose latents, camera and prompt depend only on the seed."""
    rng = np.random.default_rng(seed)
    fields = {
        "latents": rng.standard_normal(SHAPE).astype(np.float16),
        "c2w": random_path(rng, FRAMES),
        "intrinsics": (rng.uniform(0.9, 1.1, (FRAMES, 4)) * [50, 45, 33, 22]).astype(np.float32),
        "width": SIZE[0],
        "height": SIZE[1],
        "prompt": f"prompt {seed}",
    }
    return ZipSample(key=key, **{**fields, **over})  # pyright: ignore[reportArgumentType]


def write_set(folder: Path, zips: int = 3, samples: int = 4) -> Path:
    """Writes `zips` zips with `samples` samples s<zip><number> each."""
    for number in range(zips):
        write_zip_latents(
            folder,
            f"part.{number}",  # a dot in the name, as upstream's have
            [make_sample(f"s{number}{i}", 10 * number + i) for i in range(samples)],
        )
    return folder


def folders(*sets: Path) -> Sequence[tuple[Path, Path]]:
    """Returns the folders for `index_zips`."""
    return [(folder / "raw", folder / "latents") for folder in sets]


def flip_bytes(file: Path, member: str) -> None:
    """Damages the middle of a stored member of a zip, but not the zip's directory."""
    import zipfile

    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(member)
    content = bytearray(file.read_bytes())
    middle = info.header_offset + 30 + len(member) + info.file_size // 2
    for i in range(middle, middle + 16):
        content[i] ^= 0xFF
    file.write_bytes(content)
