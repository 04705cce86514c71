"""Members of a zip and rows of a camera file by key. Uses numpy only."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import by_name, is_companion, one_form


def members(archive: zipfile.ZipFile, ending: str) -> dict[str, zipfile.ZipInfo]:
    """Returns the members `<key><ending>` by key, without the companions that macOS adds.

    Raises:
      InputError: two members have one key.
    """
    found = (
        (info.filename.removeprefix("./").removesuffix(ending), info)
        for info in archive.infolist()
        if info.filename.endswith(ending) and not is_companion(info.filename)
    )
    return by_name(found, archive.filename)


class LatentArchive(zipfile.ZipFile):
    """A zip of latents, whose members are opened by key."""

    def __init__(self, file: Path):
        super().__init__(file)
        self._by_key = members(self, ".npz")

    def open_key(self, key: str) -> zipfile.ZipExtFile:
        """Opens the latents of a sample; raises `KeyError` if there are none."""
        member = self.open(self._by_key[key])
        assert isinstance(member, zipfile.ZipExtFile)
        return member


class CameraFile:
    """The whole content of a `_camera.npz` file.

    Raises:
      InputError: two samples have one key.
      KeyError, ValueError: the file lacks an array, or has one of another shape.
    """

    def __init__(self, file: Path):
        with np.load(file, allow_pickle=False) as arrays:
            places = zip(arrays["ids"], arrays["ranges"], strict=True)
            self._places = by_name(
                ((str(key), (int(start), int(count))) for key, (start, count) in places), file
            )
            self._pose = np.asarray(arrays["pose"], np.float32)
            self._intrinsics = np.asarray(arrays["intrinsics"], np.float32)

    def __contains__(self, key: str) -> bool:
        return one_form(key) in self._places

    def of(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the poses (N, 4, 4) and intrinsics (N, 4) of a sample."""
        start, count = self._places[one_form(key)]
        if not 0 <= start <= start + count <= min(len(self._pose), len(self._intrinsics)):
            raise InputError(
                f"its range {start} + {count} is outside the {len(self._pose)} poses of the file"
            )
        rows = slice(start, start + count)
        return self._pose[rows], self._intrinsics[rows]
