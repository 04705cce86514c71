"""Trajectories of a teacher on disk, in the LMDB layout that the official trainer reads.

A store is a folder with `data.mdb`, or a folder of such shards in the order of their names. The key
`NAME_shape` has the sizes of an array as text, the number of rows N first, and `NAME_ROW_data` has
the bytes of one row.

    latents            N K T C h w   float16, states at K levels, noisiest first, the clean one last
    camera_conditions  N T 20        float16
    chunk_plucker      N 48 T h w    float16
    prompts            N             UTF-8
    first_frame        N C 1 h w     float16, optional

Our stores also have `timesteps` (1 K), the levels; `caption` (N), a row of the next two arrays; and
`text` (U + 1, L, width) and `text_mask` (U + 1, L), the hidden states of the captions, the empty
one last. Other readers ignore them.

Axis letters: N rows, K levels, T latent frames, C channels, h w latent rows and columns, U
captions, L text tokens.
Source: NVlabs/Sana, the data set of the distilled SANA-WM's ODE regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.runtime.errors import InputError

_DTYPES = {
    "latents": np.float16,
    "camera_conditions": np.float16,
    "chunk_plucker": np.float16,
    "first_frame": np.float16,
    "timesteps": np.float32,
    "caption": np.int32,
    "text": np.float16,
    "text_mask": np.uint8,
}
REQUIRED = ("latents", "camera_conditions", "chunk_plucker", "prompts")
_MAP_SIZE = 2**42  # the most that a shard may hold; it is not allocated
_FILE = "data.mdb"


def _lmdb() -> Any:
    try:
        import lmdb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "trajectories in LMDB files need lmdb: pip install 'sanawm-jax[ode]'"
        ) from None
    return lmdb


class Shard:
    """One LMDB file.

    Args:
      folder: holds `data.mdb`, or is made to hold it.
      write: whether rows can be added.

    Raises:
      InputError: on construction, it is damaged or cannot be opened.
    """

    def __init__(self, folder: str | Path, *, write: bool = False):
        self.folder = Path(folder)
        lmdb = _lmdb()
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._env = lmdb.open(
                str(self.folder),
                map_size=_MAP_SIZE if write else 0,
                readonly=not write,
                lock=write,
                readahead=False,
                meminit=False,
            )
        except lmdb.Error as error:
            raise InputError(f"the shard {self.folder} cannot be opened ({error})") from None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Sizes of an array, rows first; None if the shard does not have it."""
        value = self._get(f"{name}_shape")
        if value is None:
            return None
        try:
            return tuple(int(part) for part in value.decode("ascii").split())
        except ValueError:
            raise InputError(f"the shard {self.folder} is damaged: {name}_shape") from None

    @property
    def rows(self) -> int:
        """N; 0 if nothing is written yet."""
        return (self.shape("latents") or (0,))[0]

    def check(self) -> None:
        """Compares names, shapes and the last row.

        Raises:
          InputError: an array is missing, or has another number of rows than the others.
        """
        for name in REQUIRED:
            shape = self.shape(name)
            if shape is None:
                raise InputError(f"the shard {self.folder} has no {name}_shape")
            if shape[0] != self.rows or not self.rows:
                raise InputError(
                    f"the shard {self.folder} has {self.rows} rows of latents and {shape[0]} of "
                    f"{name}"
                )
            self.read(name, self.rows - 1)

    def read(self, name: str, row: int) -> Any:
        """One row: an array, or text.

        Raises:
          InputError: it is missing or has another size.
        """
        value, shape = self._get(f"{name}_{row}_data"), self.shape(name)
        if value is None or shape is None:
            raise InputError(f"the shard {self.folder} is damaged: it has no {name} of row {row}")
        if name == "prompts":
            return value.decode("utf-8")
        dtype = np.dtype(_DTYPES[name])
        if len(value) != dtype.itemsize * np.prod(shape[1:], dtype=np.int64):
            raise InputError(
                f"the shard {self.folder} is damaged: {name} of row {row} has {len(value)} bytes, "
                f"which is not {shape[1:]}"
            )
        return np.frombuffer(value, dtype).reshape(shape[1:])

    def append(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Adds rows in one transaction: after a crash they are all there, or none is.

        Args:
          rows: by name, arrays with the new rows first, and the list of prompts.
        """
        first = self.rows
        with self._env.begin(write=True) as transaction:
            for name, values in rows.items():
                self._put(transaction, name, values, first)

    def put(self, name: str, value: np.ndarray) -> None:
        """Writes an array that does not grow with the rows."""
        with self._env.begin(write=True) as transaction:
            self._put(transaction, name, value, 0)

    def close(self) -> None:
        self._env.close()

    def _put(self, transaction: Any, name: str, values: Any, first: int) -> None:
        shape: tuple[int, ...] = (first + len(values),)
        if name != "prompts":
            values = np.ascontiguousarray(values, _DTYPES[name])
            shape += values.shape[1:]
        transaction.put(f"{name}_shape".encode(), " ".join(map(str, shape)).encode())
        for i, value in enumerate(values):
            data = value.encode() if name == "prompts" else value.tobytes()
            transaction.put(f"{name}_{first + i}_data".encode(), data)

    def _get(self, key: str) -> bytes | None:
        lmdb = _lmdb()
        try:
            with self._env.begin() as transaction:
                return transaction.get(key.encode())
        except lmdb.Error as error:
            raise InputError(f"the shard {self.folder} is damaged ({error})") from None


def find_shards(folder: str | Path) -> list[Path]:
    """The shards of a store by name.

    Raises:
      InputError: there is none.
    """
    folder = Path(folder)
    if (folder / _FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{_FILE}"))
    if not found:
        raise InputError(f"{folder} holds no {_FILE} and no folders with one")
    return found


class OdePairs:
    """A store as training reads it.

    Args:
      folder: of the store.
      steps: timesteps of the student's levels, and 0.

    Attributes:
      shape: K, T, C, h, w.
      prompts: of all rows.

    Raises:
      InputError: a shard is damaged, shards differ, or the levels are others than `steps`.
    """

    def __init__(self, folder: str | Path, steps: Sequence[float]):
        self._shards: list[Shard] = []
        try:
            self._open(folder, steps)
        except InputError:
            self.close()
            raise

    def _open(self, folder: str | Path, steps: Sequence[float]) -> None:
        for path in find_shards(folder):
            self._shards.append(Shard(path))
            self._shards[-1].check()
        shapes = {str(s.folder): (s.shape("latents") or ())[1:] for s in self._shards}
        self.shape: tuple[int, ...] = next(iter(shapes.values()))
        if others := [name for name, shape in shapes.items() if shape != self.shape]:
            raise InputError(f"the shard {others[0]} has rows of {shapes[others[0]]}")
        self._check_levels(steps)
        counts = [shard.rows for shard in self._shards]
        self._ends = np.cumsum(counts)
        self.prompts = [s.read("prompts", row) for s in self._shards for row in range(s.rows)]

    def _check_levels(self, steps: Sequence[float]) -> None:
        for shard in self._shards:
            levels = shard.read("timesteps", 0) if shard.shape("timesteps") else None
            if self.shape[0] != len(steps) or (
                levels is not None and not np.allclose(levels, steps)
            ):
                found = f"{self.shape[0]} levels" if levels is None else f"levels {levels.tolist()}"
                raise InputError(
                    f"the shard {shard.folder} has {found}, and denoising_step_list is "
                    f"{tuple(steps)}; make pairs of these levels"
                )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def close(self) -> None:
        """Closes the files; LMDB opens a file only once per process."""
        for shard in self._shards:
            shard.close()

    def captions(self) -> tuple[np.ndarray, np.ndarray] | None:
        """text (U + 1, L, width) and mask (U + 1, L) of the first shard; None if it has none."""
        shard = self._shards[0]
        if shard.shape("text") is None:
            return None
        count = (shard.shape("text") or (0,))[0]
        text, mask = ([shard.read(n, i) for i in range(count)] for n in ("text", "text_mask"))
        return np.stack(text), np.stack(mask) > 0

    def row(self, index: int) -> dict[str, Any]:
        """One row in our layout, channels last.

        Returns:
          trajectory (K, F, H, W, c), camera (F, 20), plucker (F, H, W, 48), and caption (), the
          number of its caption or -1.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        row = int(index - self._ends[number] + shard.rows)
        latents = np.moveaxis(shard.read("latents", row), 2, -1)
        if shard.shape("first_frame") is not None:
            latents = latents.copy()
            latents[:, 0] = np.moveaxis(shard.read("first_frame", row), 0, -1)
        has_caption = shard.shape("caption") is not None
        return {
            "trajectory": latents,
            "camera": shard.read("camera_conditions", row),
            "plucker": np.moveaxis(shard.read("chunk_plucker", row), 0, -1),
            "caption": shard.read("caption", row) if has_caption else np.int32(-1),
        }

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of indices of any shape, stacked."""
        found = [self.row(int(index)) for index in indices.ravel()]
        return {
            name: np.stack([row[name] for row in found]).reshape(
                *indices.shape, *found[0][name].shape
            )
            for name in found[0]
        }
