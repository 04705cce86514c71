"""Random access to the samples of upstream's zip-latent format, for Grain. Uses numpy only.

Axis letters: C latent channels, F latent frames, H W latent rows and columns, N pixel frames, L
text tokens. Source of the format: NVlabs/Sana `sana_wm_zip_latent_data.py`.
"""

from __future__ import annotations

import io
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from sanawm_jax.camera.intrinsics import WIDEST_FOV_DEG, field_of_view
from sanawm_jax.camera.npy import to_finite_float32
from sanawm_jax.camera.poses import load_c2w
from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.data.bad_samples import BadSample, Problem
from sanawm_jax.data.zip_index import Item, Pack, ZipIndex
from sanawm_jax.data.zip_members import CameraFile, LatentArchive
from sanawm_jax.runtime.errors import InputError

_OPEN_ZIPS = 32  # file handles that a process keeps
MEASURED = 100  # samples that `measure` tries to read
_OPEN_CAMERAS = 8  # few, because the cameras of one zip take megabytes
_T = TypeVar("_T")


class ZipLatents:
    """Random access to the samples of an index. Pickling leaves out the open files.

    Args:
      index: see `zip_index.index_zips`.
      latent_frames: F; longer samples are cut, shorter ones are not used.
      repeat: how often each sample comes in an epoch; each time its caption is drawn again.
      text: caption -> hidden states (L, width) and mask (L,), see `text_cache.TextCache`; with None
        a sample holds the caption itself.
      temporal: pixel frames per latent frame.
    """

    def __init__(
        self,
        index: ZipIndex,
        latent_frames: int,
        *,
        repeat: int = 1,
        text: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None,
        temporal: int = 8,
    ):
        if latent_frames < 1 or repeat < 1:
            raise InputError("data.num_frames and data.repeat must be at least 1")
        self.index = index
        self.latent_frames = latent_frames
        self._repeat = repeat
        self.text = text
        self.temporal = temporal
        self.shape: tuple[int, int, int] | None = None  # C H W that a sample must have
        self._open_caches()

    def _open_caches(self) -> None:
        self._lock = threading.Lock()
        self._zips: _Recent[LatentArchive] = _Recent(_OPEN_ZIPS)
        self._cameras: _Recent[CameraFile] = _Recent(_OPEN_CAMERAS)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_zips", "_cameras")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()

    def measure(self) -> tuple[int, int, int]:
        """Returns (C, H, W) of the first sample that can be read. All others must have that shape.

        Raises:
          InputError: none of the first hundred samples can be read, or the set is empty.
        """
        last = "the set is empty"
        for item in self.index.items[:MEASURED]:
            try:
                latents = self._latents(self.index.packs[item.pack], item)
            except BadSample as error:
                last = str(error)
                continue
            _, height, width, channels = latents.shape
            self.shape = (channels, height, width)
            return self.shape
        raise InputError(f"none of the first samples can be read; the last one: {last}")

    def __len__(self) -> int:
        return len(self.index.items) * self._repeat

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Calls `read` with a caption that depends only on the number."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self.read(number % len(self), np.random.default_rng(number % len(self)))

    def read(self, number: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns one sample.

        Args:
          number: below `len(self)`.
          rng: draws the caption.

        Returns:
          latents (F, H, W, C), camera (F, 20) and plucker (F, H, W, 6 * temporal), all float32; and
          text (L, width) with text_mask (L,), or, without an encoder, caption, a string.

        Raises:
          BadSample: the sample is damaged, missing, not finite, not rigid, of another size, or too
            short.
        """
        item = self.index.items[number % len(self.index.items)]
        pack = self.index.packs[item.pack]
        latents = self._latents(pack, item)
        camera, plucker = self._camera(pack, item, *latents.shape[1:3])
        row: dict[str, Any] = {"latents": latents, "camera": camera, "plucker": plucker}
        weights = np.array([weight for _, weight in item.captions])
        caption = item.captions[rng.choice(len(weights), p=weights / weights.sum())][0]
        if self.text is None:
            return {**row, "caption": caption}
        row["text"], row["text_mask"] = self.text(caption)
        return row

    def _latents(self, pack: Pack, item: Item) -> np.ndarray:
        def bad(reason: str, is_bad: bool = True) -> BadSample:
            return BadSample(Problem(str(pack.latents), item.key, reason, is_bad=is_bad))

        try:
            with self._lock:
                archive = self._zips.take(pack.latents, LatentArchive)
                member = archive.open_key(item.key)
            with member:  # a read to the end checks the checksum
                latents = _read_latents(member.read())
        # On damaged bytes, zipfile, zlib and numpy may raise many kinds of errors.
        except Exception as error:
            raise bad(f"{item.key}.npz cannot be read ({_reason(error)})") from error
        if latents.ndim != 4:
            raise bad(f"z has the shape {latents.shape}, not (C, T, h, w)")
        channels, frames, height, width = latents.shape
        if self.shape is not None and (channels, height, width) != self.shape:
            raise bad(f"latents (C, h, w) are {(channels, height, width)}, not {self.shape}")
        if frames < self.latent_frames:
            raise bad(f"{frames} latent frames, fewer than {self.latent_frames}", is_bad=False)
        latents = np.ascontiguousarray(
            latents[:, : self.latent_frames].transpose(1, 2, 3, 0), np.float32
        )
        if not np.isfinite(latents).all():
            raise bad("latents hold NaN or infinity")
        return latents

    def _camera(
        self, pack: Pack, item: Item, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        try:
            with self._lock:
                cameras = self._cameras.take(pack.camera, CameraFile)
            pose, intrinsics = cameras.of(item.key)
            return camera_tensors(
                pose,
                intrinsics,
                (item.width, item.height),
                (self.latent_frames, height, width),
                scale=item.scale,
                temporal=self.temporal,
            )
        except Exception as error:
            raise BadSample(Problem(str(pack.camera), item.key, _reason(error))) from error


def camera_tensors(
    pose: np.ndarray,
    intrinsics: np.ndarray,
    size: tuple[int, int],
    latent_shape: tuple[int, int, int],
    *,
    scale: float = 1.0,
    temporal: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes stage 1's camera inputs from a camera sidecar, for the latent grid.

    There may be up to `temporal - 1` fewer poses than pixel frames. Then the last pose is repeated.

    Args:
      pose: (N, 4, 4) camera-to-world.
      intrinsics: (N, 4) [fx, fy, cx, cy] in pixels of a video of `size`.
      size: (width, height).
      latent_shape: (F, H, W). Each axis of the video is scaled to this grid on its own.
      scale: factor of the translations.
      temporal: pixel frames per latent frame.

    Returns:
      camera (F, 20) and plucker (F, H, W, 6 * temporal), float32; see
      `camera.rays.camera_conditions`.

    Raises:
      InputError: the poses are too few, not finite or not rigid.
    """
    frames, height, width = latent_shape
    needed = (frames - 1) * temporal + 1
    known = min(len(pose), needed)
    if known <= needed - temporal or len(intrinsics) < known:
        raise InputError(
            f"{len(pose)} poses and {len(intrinsics)} intrinsics for {needed} pixel frames"
        )
    c2w = load_c2w(pose[:known]).astype(np.float64)
    c2w[:, :3, 3] *= scale
    to_grid = np.array([width / size[0], height / size[1]] * 2)
    on_grid = to_finite_float32(np.asarray(intrinsics[:known]) * to_grid, "intrinsics")
    if (on_grid[:, :2] <= 0).any():
        raise InputError("intrinsics: focal lengths must be positive")
    widest = field_of_view(on_grid, width, height).max()
    if widest > WIDEST_FOV_DEG:
        raise InputError(f"intrinsics: {widest:.1f} degrees of view; the unit must be pixels")
    rows = np.minimum(np.arange(needed), known - 1)
    # The spatial ratio is 1, because the intrinsics are already in units of the latent grid.
    camera, plucker = camera_conditions(c2w[rows], on_grid[rows], height, width, temporal, 1)
    # A token after the last pose is a copy of the token before it. It does not use the last pose.
    last = (known - 1) // temporal
    camera[last + 1 :] = camera[last]
    return camera, plucker


class _Recent(Generic[_T]):
    """A cache of objects that are made from files. It keeps the most recently used ones."""

    def __init__(self, size: int):
        self._size = size
        self._kept: OrderedDict[Path, _T] = OrderedDict()

    def take(self, file: Path, make: Callable[[Path], _T]) -> _T:
        """Returns the object of a file; `make` makes it if the cache does not have it."""
        if file not in self._kept:
            self._kept[file] = make(file)
            if len(self._kept) > self._size:
                old = self._kept.popitem(last=False)[1]
                # Another thread may still read a member. Then the file stays open until it is done.
                if isinstance(old, zipfile.ZipFile):
                    old.close()
        self._kept.move_to_end(file)
        return self._kept[file]


def _read_latents(content: bytes) -> np.ndarray:
    """Returns `z` or the only array of a `.npz` file, or the array of an `.npy` file."""
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = loaded.files
        if "z" in names or len(names) == 1:
            return loaded["z" if "z" in names else names[0]]
    raise InputError(f"no array z, but {', '.join(names)}")


def _reason(error: Exception) -> str:
    text = str(error).splitlines()
    if isinstance(error, InputError):
        return text[0]
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
