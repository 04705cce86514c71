"""The published weights fit our models: SANAWM_WEIGHTS=DIR pytest tests/unit/sampling."""

from __future__ import annotations

import os

import pytest

from sanawm_jax.checkpoints.folder import Stage1Folder
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder


def folder_of(variable: str) -> str:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no folder in diffusers layout")
    return os.environ[variable]


def test_stage1() -> None:
    """Every tensor of every network by name and shape, from the headers alone."""
    folder = Stage1Folder(folder_of("SANAWM_WEIGHTS"))
    for part in ("transformer", "text_encoder", "encoder", "decoder"):
        folder.check(part)
    folder.schedule()


def test_refiner() -> None:
    RefinerFolder(folder_of("SANAWM_REFINER_WEIGHTS")).check()
