"""Published weight files: safetensors, one file or several with an index, read lazily."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import is_companion
from sanawm_jax.runtime.json_file import read_json

# names that ComfyUI, DeepSeek, torchao, bitsandbytes and others give to scales of weights
_SCALE = re.compile(
    r"(^|[._])(scale_(weight|input|inv)|(weight|input|output)_scale(_inv|_2)?|scaled_fp8|absmax|"
    r"quant_map|quant_state|qscale|scales?|zero_point|qzeros)(\.|$)"
)
_MOST_LAYERS = 10_000
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# names of a safetensors header; its formats of 4 and 6 bits have no NumPy dtype
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsFolder:
    """The tensors of one component folder, e.g. `transformer/`.

    Finds `*.safetensors.index.json` and its shards, or the one `*.safetensors` file. Shapes come
    from the headers; `read` copies one tensor at a time, and several threads may call it.

    Args:
      folder: of the files.
      names: the files to read, if only some.

    Raises:
      InputError: no such folder, nothing to load, only pickles, a truncated file, or a number
        format that cannot be read.
    """

    def __init__(self, folder: str | Path, names: Iterable[str] = ()):
        from safetensors import SafetensorError, safe_open

        folder = Path(folder)
        self._tensors: dict[str, _Stored] = {}
        for file in [folder / name for name in names] or _files(folder):
            try:
                safe_open(str(file), framework="numpy")  # compares the header with the file
                stored = _header(file)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file} is truncated or not a safetensors file ({error}); fetch it again"
                ) from None
            for key in stored:
                if key in self._tensors:
                    raise InputError(f"{folder} holds tensor {key} in two files; keep one of them")
            self._tensors.update(stored)
        self._refuse_scales(folder)

    def _refuse_scales(self, folder: Path) -> None:
        """Without their scales, weights of one byte would be read as noise."""
        if all(stored.dtype.itemsize > 1 for stored in self._tensors.values()):
            return
        scales = sorted(filter(_SCALE.search, self._tensors))
        if scales:
            raise InputError(
                f"{folder} holds quantised weights with {len(scales)} tensors of scales such as "
                f"{scales[0]}, which are not applied here; use the bfloat16 weights"
            )

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> np.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> np.ndarray:
        stored = self._tensors[key]
        out = np.empty(stored.shape, stored.dtype)
        left = out.reshape(-1).view(np.uint8).data
        # not a memory map: its pages count as the process's memory, and page faults hold the lock
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            while left:
                count = file.readinto(left)
                if not count:
                    raise InputError(f"{stored.file} is truncated; fetch it again")
                left = left[count:]
        return out


def _header(path: Path) -> dict[str, _Stored]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: tensor {key} is stored as {entry['dtype']}, which cannot be read here; "
                f"use one of {', '.join(DTYPES)}"
            )
    return {
        key: _Stored(
            path,
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
        )
        for key, entry in header.items()
    }


class Tensors:
    """Tensors in memory, as a source for `keymap.load`."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = tensors

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> np.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> np.ndarray:
        return self._tensors[key]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"weights folder {folder} does not exist")
    indices = _own(folder, "*.safetensors.index.json")
    if len(indices) > 1:
        raise InputError(f"{folder} has {len(indices)} index files; keep the one to load")
    if indices:
        names = _shards(indices[0])
        here = {file.name for file in folder.iterdir() if file.is_file()}
        absent = [name for name in names if name not in here]
        if absent:
            raise InputError(f"{folder} lacks the shards {', '.join(absent)} that its index names")
        return [folder / n for n in names]
    files = _own(folder, "*.safetensors")
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise InputError(
            f"{folder} holds only pickles ({', '.join(pickles)}), which can run code when opened; "
            "convert them to safetensors"
        )
    raise InputError(f"{folder} holds no .safetensors file")


def _own(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if not is_companion(file.name))


def _shards(index: Path) -> list[str]:
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    given = list(shards.values()) if isinstance(shards, dict) else []
    names = sorted({n for n in given if isinstance(n, str) and 0 < len(n.encode()) < 256})
    if not names or any(n not in names for n in given) or any(Path(n).name != n for n in names):
        raise InputError(f"{index} has no weight_map with the names of files; fetch it again")
    return names


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what wrong values of a configuration raise inside the block into one `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} has a value that cannot be used ({reason})") from error


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """A component's JSON configuration without its underscored bookkeeping keys.

    Raises:
      InputError: the file is absent or not JSON.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path} does not exist; is this a diffusers-layout folder?")
    loaded = read_json(path)
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no object of named values; fetch it again")
    return {k: v for k, v in loaded.items() if not k.startswith("_")}


def class_name(folder: str | Path) -> str | None:
    """The class that a component's `config.json` names, if it names one."""
    path = Path(folder) / "config.json"
    try:
        return read_json(path).get("_class_name")
    except (InputError, AttributeError):
        return None  # reading the configuration itself says what is wrong


def config_fields(cls: type, raw: dict[str, Any], *, what: str) -> dict[str, Any]:
    """`raw` as keyword arguments of the frozen dataclass `cls`; lists become tuples.

    Raises:
      InputError: keys that the dataclass does not have.
    """
    known = {f.name for f in dataclasses.fields(cls) if f.metadata.get("published", True)}
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise InputError(f"{what} has unknown fields {', '.join(unknown)}")
    check_layers(raw, what)
    hints = typing.get_type_hints(cls)
    return {k: _checked(_tuples(v), hints[k], f"{what}: {k}") for k, v in raw.items()}


def check_layers(raw: dict[str, Any], what: str) -> None:
    """Raises `InputError` for numbers of layers that would fill the memory with their list."""
    for name, value in raw.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if "layers" in name and is_number and not abs(number) <= _MOST_LAYERS:
                raise InputError(f"{what}: {name} is {number:g}; fetch the file again")


def _checked(value: Any, hint: Any, what: str) -> Any:
    """Returns a value as the type that a field has; a whole number may be written as 3 or 3.0.

    Raises:
      InputError: it has another type.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is typing.Any or kind is typing.Literal:
            return value
        if kind is tuple and isinstance(value, tuple):
            inner = typing.get_args(option)
            if inner[1:] == (...,):
                inner = inner[:1] * len(value)
            if len(inner) == len(value):
                return tuple(_checked(v, t, what) for v, t in zip(value, inner, strict=True))
        if isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value) and (kind is float or (kind is int and value == int(value))):
                return value if kind is float else int(value)
        if kind not in (int, float, tuple) and isinstance(value, kind):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise InputError(f"{what} is {reprlib.repr(value)}, not {names}; fetch the file again")


def published_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that a published `config.json` has; see `config_fields`."""
    fields = dataclasses.fields(config)
    values = dataclasses.asdict(config)
    return {f.name: values[f.name] for f in fields if f.metadata.get("published", True)}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
