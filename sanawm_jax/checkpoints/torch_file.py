"""Tensors of a `torch.save` file, without torch and without running what the file says.

Such a file is a zip archive: `data.pkl` is a pickle of the containers, in which a tensor is a
reference to one of the uncompressed members `data/0`, `data/1`... that hold the numbers. A pickle
can name any function of any module and call it. This reader only resolves the names of a short
list, and replaces them with harmless objects of its own, so that a file can build containers and
describe tensors and do nothing else. `torch.load(weights_only=True)` does the same with a longer
list. But it needs torch, which this package does not require, and it reads everything, including
the optimizers in a training checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sanawm_jax.runtime.errors import InputError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"}
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class _StorageType:
    __slots__ = ("dtype",)

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(dtype)


class _Storage:
    __slots__ = ("dtype", "key", "size")

    def __init__(self, dtype: np.dtype, key: str, size: int):
        self.dtype, self.key, self.size = dtype, key, size


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildTensor:
    """Replaces `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def __call__(
        self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
    ) -> _Tensor:  # then: requires_grad, hooks, metadata
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without numbers")
        return _Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


class _RebuildParameter:
    """Replaces `torch._utils._rebuild_parameter`: a parameter is read as its tensor."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


class _Inert:
    """Replaces a value that no tensor needs, e.g. a device or a dtype."""

    __slots__ = ()

    def __call__(self, *_: Any) -> _Inert:
        return self


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if module == "torch" and name in _DTYPES | {"device"}:
            return _Inert()
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("a reference that is no tensor's")
        return _Storage(storage_type.dtype, str(key), int(size))


class TorchFile:
    """The tensors of one dictionary in a `torch.save` file; each is read when it is needed.

    Args:
      path: the file.
      names: dictionaries in the order of preference, e.g. `("generator", "state_dict")`; the file's
        own dictionary if it has none of them. Nothing else of the file is read.

    Raises:
      InputError: not such a file, or it needs more than tensors and plain containers.
    """

    def __init__(self, path: str | Path, names: Iterable[str] = ("generator", "state_dict")):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = {info.filename: info for info in archive.infolist()}
                pickled = [name for name in members if name.endswith("/data.pkl")]
                if len(pickled) != 1:
                    raise InputError(f"{path} is a zip archive but not a file of torch.save")
                root = pickled[0].removesuffix("data.pkl")
                order = members.get(root + "byteorder")
                if order and archive.read(order) != b"little":
                    raise InputError(f"{path} is big-endian; save it again on another machine")
                loaded = _Unpickler(io.BytesIO(archive.read(pickled[0]))).load()
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is not a zip archive of torch.save ({error}); convert it to safetensors"
            ) from None
        except InputError:
            raise
        except Exception as error:  # a broken pickle can raise anything
            raise InputError(
                f"{path} is refused: only tensors and plain containers are read, and "
                f"{error or type(error).__name__}"
            ) from None
        self._members, self._root = members, root
        self._tensors = _tensors(loaded, names, self.path)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> np.dtype:
        return self._tensors[key].storage.dtype

    def read(self, key: str) -> np.ndarray:
        """A copy of one tensor.

        Raises:
          InputError: its numbers are missing or too few.
        """
        tensor = self._tensors[key]
        storage, name = tensor.storage, f"{self._root}data/{tensor.storage.key}"
        info = self._members.get(name)
        item = storage.dtype.itemsize
        last = tensor.offset + sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
        )
        if min(tensor.offset, *tensor.shape, *tensor.strides, 0) < 0:
            raise InputError(f"{self.path} describes tensor {key} with negative sizes")
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, storage.dtype)
        is_stored = info is not None and info.compress_type == zipfile.ZIP_STORED
        if info is None or not is_stored or last >= min(storage.size, info.file_size // item):
            raise InputError(f"{self.path} is truncated: tensor {key} is not whole")
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            assert magic == b"PK\3\4", magic
            file.seek(name_length + extra_length + tensor.offset * item, 1)
            flat = np.fromfile(file, storage.dtype, last - tensor.offset + 1)
        strides = tuple(s * item for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).copy()


def _tensors(loaded: Any, names: Iterable[str], path: Path) -> dict[str, _Tensor]:
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    chosen = next((loaded[n] for n in names if isinstance(loaded.get(n), dict)), loaded)
    odd = [k for k, v in chosen.items() if not (isinstance(k, str) and isinstance(v, _Tensor))]
    if odd or not chosen:
        listed = ", ".join(map(str, odd[:5]))
        raise InputError(f"{path} holds no dictionary of tensors alone ({listed or 'it is empty'})")
    return dict(chosen)
