"""The environment variables of tests and of the commands that they start. Set before JAX starts."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# tests are about numbers, and two workers share two cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# threads of the reference that wait for each other burn more time than they save
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nearly all of the time is compilation of tiny programs, most of which run once
_QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault(_QUICK, "1")
if os.environ.get(_QUICK, "0").lower() not in ("0", "false", "off"):
    # kernels straight from LLVM compile twice as fast as through MLIR; later versions of XLA have
    # MLIR alone, and end a process that gives a flag which they do not know
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_cpu_use_fusion_emitters=false".strip()
# what one process compiled, the others and the commands under test need not: workers and
# subprocesses inherit the folder from the first process, which removes it
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.mkdtemp(prefix="sanawm_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)


def users_environment() -> dict[str, str]:
    """Returns the environment of a command that compiles as it does for a user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_FLAGS"))}
    return {**kept, "JAX_PLATFORMS": os.environ["JAX_PLATFORMS"], "SANAWM_COMPILATION_CACHE": "off"}
