"""Settings that every test shares."""

from __future__ import annotations

import tests.environment  # before jax starts
import tests.shapes  # noqa: F401  before the package is imported

# isort: split
import gc
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Clears JAX's caches before each module, and limits the garbage collector to new objects.

    Otherwise the collector would scan millions of objects of imported libraries and earlier tests
    again and again while JAX traces. The last tests would take several times as long as alone.
    """
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Returns random numbers that depend only on the name of the test."""
    return np.random.default_rng(abs(hash_of(request.node.name)))


def hash_of(text: str) -> int:
    """Returns a hash that is the same in every process."""
    return int.from_bytes(text.encode()[-8:].rjust(8, b"\0"), "little")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips multi-device tests unless requested: a process cannot change its number of devices."""
    if collection_path.name == "multi_device" and collection_path.is_dir():
        return True if not any("multi_device" in arg for arg in config.args) else None
    return None
