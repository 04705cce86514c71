"""Whole programs kept from run to run, so that a second run neither traces nor lowers them.

JAX's own cache saves the compiler's time, and is asked with the lowered program. Here the question
is everything that a trace depends on: the package's source, versions, device, settings, and the
arguments' shapes. `use_compilation_cache` switches it on; without it, on an accelerator, for
arguments that are not all on one device, and wherever anything is in doubt, `kept` is plain
`jax.jit`.

The files are read with pickle, as JAX's own are run as machine code: the folder is its owner's
alone (mode 0700), and must hold nothing from strangers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import pickle
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.core
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

import kernels_pallas
from kernels_pallas import choice
from sanawm_jax.runtime.atomic import atomic_write

MAX_BYTES = 2**30  # of all files; beyond it those go that have not been used for longest
_SUFFIX = ".program"
_BROKEN = b"loads but cannot run"  # a file that is no program: never keep this one
# what a program may call that is not in it: hints to the compiler. Anything else may be registered
# only where it is lowered.
_CALLS = {"Sharding", "annotate_device_placement"}
# code that graph definitions name; a class of the user's has source that nobody hashed
_KNOWN = ("sanawm_jax.", "flax.", "jax.", "numpy", "builtins")
_VARIABLES = ("XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "TF_")
# settings under which a call is more than its program
_WATCHED = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_enable_pgle")
_log = logging.getLogger(__name__)
_folder: Path | None = None


class _Unkept(Exception):
    """This call is `jax.jit`'s."""


def keep_in(folder: Path | None) -> None:
    """Keeps programs in a folder from now on; None, or one that cannot be made, keeps none."""
    global _folder
    _folder = None
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _folder = folder


def kept(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`functools.partial(jax.jit, **options)` as a decorator, whose programs are kept.

    Args:
      options: `static_argnames` and `donate_argnames`.
    """
    return functools.partial(Kept, options=options)


class Kept:
    """A compiled function; see `kept`. What is no call, such as `lower`, is the jitted function's.

    Args:
      function: what to compile.
      options: of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._jitted = jax.jit(function, **options)
        names = options.get("static_argnames", ())
        self._static = {names} if isinstance(names, str) else set(names)
        self._options = repr(sorted(options.items()))
        self._order = list(inspect.signature(function).parameters)
        self._programs: dict[Any, Callable[..., Any] | None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_jitted"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # an accelerator's programs call kernels, and JAX's own cache keeps them; whole ones would
        # have to be proven there first
        is_here = _folder is not None and jax.default_backend() == "cpu"
        if not is_here or len(args) > len(self._order):
            return self._jitted(*args, **kwargs)
        named = dict(zip(self._order, args, strict=False)) | kwargs
        static = {k: named[k] for k in self._order if k in self._static and k in named}
        given = tuple(a for k, a in zip(self._order, args, strict=False) if k not in self._static)
        by_name = {k: a for k, a in kwargs.items() if k not in self._static}
        key = None
        try:
            leaves, tree = jax.tree.flatten((given, by_name))
            key = (tree, tuple(map(_describe, leaves)), tuple(static.items()), _surroundings())
            if key not in self._programs:
                self._programs[key] = None  # if what follows fails
                self._programs[key] = self._find(key, args, kwargs)
            program = self._programs[key]
        except (_Unkept, OSError) as reason:
            _log.debug("%s is not kept: %s", self.__qualname__, reason)
            program = None
        if program is None:
            return self._jitted(*args, **kwargs)
        try:
            return program(*given, **by_name)
        except (TypeError, ValueError) as error:  # the arguments' check, or `_try`; nothing has run
            _log.debug("%s: the kept program does not fit: %s", self.__qualname__, error)
            self._programs[key] = None
            return self._jitted(*args, **kwargs)

    def _find(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The program from its file, else compiled, and kept if it can be."""
        tree, described, static, around = key
        where = f"{self.__module__}.{self.__qualname__}"
        parts = [where, self._options, str(tree), repr(described), around, _machine()]
        text = "\0".join([*parts, *(f"{name}={_text(value)}" for name, value in static)])
        if " at 0x" in text:
            raise _Unkept("an argument has no name that outlives the process")
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert _folder is not None
        path = _folder / f"{self.__name__}-{digest}{_SUFFIX}"
        program = _load(path, tree)
        if program is None:
            lowered = self._jitted.lower(*args, **kwargs)
            calls = set(re.findall(r"custom_call @([\w.$]+)", lowered.as_text())) - _CALLS
            if calls:  # it is JAX's cache that keeps it
                raise _Unkept(f"it calls {', '.join(sorted(calls))}")
            with _no_other_cache():
                program = lowered.compile()
            _save(path, program)
            return program
        return functools.partial(self._try, key, path, program)

    def _try(self, key: Any, path: Path, program: Any, *args: Any, **kwargs: Any) -> Any:
        """The first call of a program from a file: one that cannot run is not asked again."""
        try:
            out = jax.block_until_ready(program(*args, **kwargs))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            _log.debug("%s cannot run: %s", path, error)
            with contextlib.suppress(OSError):
                path.write_bytes(_BROKEN)
            given = jax.tree.leaves((args, kwargs))
            if any(isinstance(a, jax.Array) and a.is_deleted() for a in given):
                raise  # what was donated is lost
            raise TypeError("it cannot run") from error
        self._programs[key] = program
        return out


def _describe(leaf: Any) -> tuple[Any, ...]:
    """What a trace sees of an argument."""
    if isinstance(leaf, np.ndarray | np.generic):
        return "numpy", leaf.shape, str(leaf.dtype)
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        raise _Unkept(f"an argument is a {type(leaf).__name__}")
    where = leaf.sharding
    if not isinstance(where, SingleDeviceSharding) or leaf.device != jax.devices()[0]:
        raise _Unkept("an argument is not on the first device alone")
    return leaf.shape, str(leaf.dtype), leaf.weak_type, leaf.committed, where.memory_kind


def _text(value: Any) -> str:
    """A static argument in words that another process would use too."""
    for node in getattr(value, "nodes", ()):  # of a graph definition
        home = getattr(getattr(node, "type", None), "__module__", "builtins")
        if not f"{home}.".startswith(_KNOWN):
            raise _Unkept(f"a module is of {home}")
    return repr(value)


def _surroundings() -> str:
    """All that may change within a process and with it a program."""
    settings = jax.config.values
    if any(settings.get(name) for name in _WATCHED):
        raise _Unkept("a setting for debugging is on")
    if not jax.sharding.get_abstract_mesh().empty or jax.process_count() > 1:
        raise _Unkept("several devices share the program")
    theirs = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache")
    named = sorted((k, v) for k, v in settings.items() if not k.startswith(theirs))
    return f"{named} {choice.in_force()}"


@functools.cache
def _machine() -> str:
    """Source, versions and device, none of which changes within a process."""
    source, count = hashlib.sha256(), 0
    for package in (Path(__file__).parents[1], Path(kernels_pallas.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            name = f"{package.name}/{file.relative_to(package)}"
            source.update(f"\0{name}\0".encode() + file.read_bytes())
            count += 1
    if not count:
        raise _Unkept("there is no source to be seen")
    device = jax.devices()[0]
    versions = {
        name: getattr(sys.modules.get(name), "__version__", None)
        for name in ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "einops")
    }
    found = [source.hexdigest(), sys.version, versions, jax.device_count(), device.id]
    found += [device.platform, device.device_kind, device.client.platform_version]
    found += sorted((k, v) for k, v in os.environ.items() if k.startswith(_VARIABLES))
    if device.platform == "cpu":
        found += [platform.machine(), _cpu_features(), os.cpu_count()]
    return repr(found)


def _cpu_features() -> str:
    """What the processor can do; a folder may be shared with a lesser one."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


@contextlib.contextmanager
def _no_other_cache() -> Iterator[None]:
    """Compiles for certain: what a CPU's compiler wrote and read back cannot be written again.

    Such a program loads and then lacks its functions (XLA of jaxlib 0.10 to 0.12).
    """
    was = jax.config.values["jax_enable_compilation_cache"]
    _set_other_cache(False)
    try:
        yield
    finally:
        _set_other_cache(was)


def _set_other_cache(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    logger = logging.getLogger(compilation_cache.reset_cache.__module__)
    level = logger.level
    logger.setLevel(logging.WARNING)  # it would tell the user of every program
    compilation_cache.reset_cache()  # JAX asks for the setting only once
    logger.setLevel(level)


def _load(path: Path, tree: Any) -> Any:
    """The program of a file; None if there is none, or none that can be used."""
    try:
        content = path.read_bytes()
        if content == _BROKEN:
            raise _Unkept("it could not run once")
        digest, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("it is damaged")
        executable, out_tree = pickle.loads(payload)
        device = jax.devices()[0]
        program = serialize_executable.deserialize_and_load(
            executable, tree, out_tree, device.client, [device]
        )
    except FileNotFoundError:
        return None
    except _Unkept:
        raise
    except Exception as error:  # whatever is wrong with it, the compiler makes another
        _log.debug("%s cannot be used: %s", path, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # `_tidy` goes by it
    _log.debug("%s: loaded", path)
    return program


def _save(path: Path, program: Any) -> None:
    """Keeps a program, if the folder takes it."""
    try:
        executable, _, out_tree = serialize_executable.serialize(program)
        payload = pickle.dumps((executable, out_tree))
        with atomic_write(path) as partial:
            partial.write_bytes(hashlib.sha256(payload).digest() + payload)
        _tidy(path.parent)
    except Exception as error:  # no run fails for want of a kept program
        _log.debug("%s cannot be kept: %s", path, error)
        return
    _log.debug("%s: kept", path)


def _tidy(folder: Path) -> None:
    """Removes what has not been used for longest, until the rest is small enough."""
    files = [(file, file.stat()) for file in folder.glob(f"*{_SUFFIX}")]
    total = sum(found.st_size for _, found in files)
    for file, found in sorted(files, key=lambda pair: pair[1].st_mtime):
        if total <= MAX_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= found.st_size
