"""The loop over clips: rows in order, metrics by stage, and runs that are killed and go on."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w, parse_actions
from sanawm_jax.eval.memory import revisit_pairs
from sanawm_jax.eval.minute import minute_path
from sanawm_jax.eval.runner import Clip, Row, Store, evaluate, plain, store_of

NAMES = [str(i) for i in range(6)]


def make(name: str) -> Clip:
    video = np.full((8, 4, 6, 3), int(name) / 10)
    return Clip({"stage1": video, "refined": 1 - video}, truth=np.zeros_like(video))


def brightness(clip: Clip, video: np.ndarray) -> Row:
    return {"brightness": video.mean(), "frames": len(video)}


def gap(clip: Clip, video: np.ndarray) -> Row:
    assert clip.truth is not None
    return {"gap": np.array([np.nan, (video - clip.truth).mean()])}


METRICS = {"brightness": brightness, "gap": gap}


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_in_order_and_have_all_metrics_of_all_stages(workers: int) -> None:
    rows = evaluate(NAMES, make, METRICS, Store(None, {}), workers, progress=False)
    assert [row["name"] for row in rows] == NAMES
    for i, row in enumerate(rows):
        assert list(row["stages"]) == ["stage1", "refined"]
        found = row["stages"]["refined"]
        assert found["frames"] == 8 and found["brightness"] == pytest.approx(1 - i / 10)
        assert found["gap"] == [None, pytest.approx(1 - i / 10)]
    json.dumps(rows, allow_nan=False)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    def dies(name: str) -> Clip:
        if name == "3":
            raise KeyboardInterrupt
        return make(name)

    folder = tmp_path / "out.json.parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate(NAMES, dies, METRICS, Store(folder, {"steps": 2}), progress=False)
    asked = []

    def count(name: str) -> Clip:
        asked.append(name)
        return make(name)

    store = Store(folder, {"steps": 2})
    rows = evaluate(NAMES, count, METRICS, store, progress=False)
    # a clip that was under way when the run died may have been finished
    assert asked[0] == "3" and set(asked) <= set("345")
    assert rows == evaluate(NAMES, make, METRICS, Store(None, {}), progress=False)
    # the pictures of earlier clips are there too: truth and two videos, 7 frames
    strip = store.strip("1")
    assert strip is not None and strip.shape == (3 * 4, 7 * 6, 3)
    assert (strip[:4] == 0).all() and (strip[4:8] == 26).all() and (strip[8:] == 230).all()
    store.remove()
    assert not folder.exists()


def test_other_settings_and_torn_rows_are_measured_again(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    evaluate(NAMES, make, METRICS, Store(folder, {"steps": 2}), progress=False)
    (folder / "rows" / "4.json").write_text('{"name": "4", "sta')
    again = Store(folder, {"steps": 2})
    assert [name in again for name in NAMES] == [True] * 4 + [False, True]
    assert not any(name in Store(folder, {"steps": 3}) for name in NAMES)
    assert not folder.exists()


def test_settings_of_a_command_line(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a.safetensors").write_bytes(b"1")
    options = argparse.Namespace(steps=2, json=str(tmp_path / "a.json"), sheet="b.png")

    def store() -> Store:
        return store_of(options, ("json", "sheet"), [str(weights)])

    evaluate(NAMES[:2], make, METRICS, store(), progress=False)
    assert (tmp_path / "a.json.parts").is_dir()
    options.sheet = "c.png"  # where results go does not matter
    assert "0" in store()
    os.utime(weights / "a.safetensors", (1, 1))  # other weights do
    assert "0" not in store()


def test_plain_figures() -> None:
    value = {"a": np.float32(1.5), "b": (np.int64(2), float("nan")), "c": [np.inf], "d": "x"}
    assert plain(value) == {"a": 1.5, "b": [2, None], "c": [None], "d": "x"}


@pytest.mark.parametrize("index", range(8))
def test_a_minute_ends_with_its_key_and_comes_back(index: int) -> None:
    action, key = minute_path(index, 961)
    held = parse_actions(action)
    assert len(held) == 960
    assert held[-48:] == [frozenset(key)] * 48
    c2w = actions_to_c2w(action)
    before = c2w[960 - 48]
    # back at the start when the last key is pressed, so the key is as free as in a short clip
    np.testing.assert_allclose(before[:3, 3], 0, atol=0.05)
    np.testing.assert_allclose(before[:3, :3], np.eye(3), atol=0.03)
    assert np.linalg.norm(c2w[:, :3, 3], axis=-1).max() < 48 * 0.025 + 0.05
    assert len(revisit_pairs(c2w)) == 5
