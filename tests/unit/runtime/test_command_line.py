"""Which defaults a command line of `sample.py` takes."""

from __future__ import annotations

import pytest

from sanawm_jax.runtime.command_line import is_released


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--action", "w-40"], False),
        (["--weights", "small_world"], False),
        (["--weights=small_world"], False),
        (["--weights", "folder"], True),
        (["-weights=owner/model"], True),
        (["--refiner_weights=folder"], True),
        (["--refiner_weights="], False),
        (["--refiner_weights", "small_world_refiner"], False),
        (["--weights=small_world", "--refiner_weights=folder"], False),
        (["--refiner_weights=small_world_refiner", "--weights=folder"], True),
        (["--prompt", "weights"], False),
        (["--weights"], False),
    ],
)
def test_is_released(words: list[str], expected: bool) -> None:
    assert is_released(["sample.py", *words]) == expected
