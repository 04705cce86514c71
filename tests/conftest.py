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
    """A module starts without the programs of those before it, and collects its own garbage alone.

    Millions of objects, of imported libraries and of earlier tests, would be scanned again and
    again while jax traces: late tests would take several times as long as when they run alone.
    """
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(abs(hash_of(request.node.name)))


def hash_of(text: str) -> int:
    """A hash that does not change from process to process."""
    return int.from_bytes(text.encode()[-8:].rjust(8, b"\0"), "little")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out tests of several devices, whose count is fixed for a process, unless asked for."""
    if collection_path.name == "multi_device" and collection_path.is_dir():
        return True if not any("multi_device" in arg for arg in config.args) else None
    return None
