"""Recorded keys: every form gives the keys of each frame, and every other file is one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w, keys_to_c2w, parse_actions
from sanawm_jax.camera.recorded_keys import read_actions
from sanawm_jax.runtime.errors import InputError

WALK = "w-2,wd-1,none-1"
FORMS = [
    ["w", "W", "wd", ""],
    ["w", "w", "w+d", "none"],
    [["w"], ["KeyW"], ["d", "w"], []],
    [{"w": True}, {"w": 1, "d": 0}, {"w": True, "d": True}, {"w": False}],
    [{"keys": "w", "frames": 2}, {"keys": ["w", "d"]}, {"keys": [], "count": 1}],
    WALK,
]


@pytest.mark.parametrize("content", [*FORMS, *({"actions": form} for form in FORMS)])
def test_every_form(content: object, tmp_path: Path) -> None:
    (tmp_path / "keys.JSON").write_text(json.dumps(content), encoding="utf-8-sig")
    held = read_actions(tmp_path / "keys.JSON")
    assert held == parse_actions(WALK) == read_actions(WALK)
    np.testing.assert_array_equal(keys_to_c2w(held), actions_to_c2w(WALK))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "holds no frames"),
        ({}, "holds no frames"),
        (7, "holds no frames"),
        ([7], "entry 0 is 7"),
        (["w", "q"], "entry 1 has unknown keys 'q'"),
        ([{"w": "down"}], "entry 0 is"),
        ([{"keys": "w", "frames": 0}], "lasts 0 frames"),
        ([{"keys": "w", "frames": 1e9}], "lasts 1000000000.0 frames"),
        ([{"keys": "w", "frames": 10**9}], "longer than 100000 frames"),
        ("w20", "has no"),
    ],
)
def test_other_files_are_one_line(content: object, words: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as caught:
        read_actions(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_text('["w", ')
    with pytest.raises(InputError, match="not valid JSON"):
        read_actions(file)
    with pytest.raises(InputError, match="cannot open"):
        read_actions(str(tmp_path / "absent.json"))
