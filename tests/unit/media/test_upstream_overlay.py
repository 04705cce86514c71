"""Upstream's overlay against pictures and numbers that its own code made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.media.upstream_overlay import UpstreamPainter, upstream_motion

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "overlay"
# the pictures have letters of this font; without it they differ there
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", ["motion", "motion_2"])
def test_motion(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as golden:
        c2w = golden["c2w"] if "c2w" in golden else np.load(GOLDEN / "c2w.npy")
        found = upstream_motion(c2w)
        np.testing.assert_array_equal(found.keys, golden["keys_wasd"])
        np.testing.assert_allclose(found.yaw, golden["yaw"], atol=1e-6)
        np.testing.assert_allclose(found.pitch, golden["pitch"], atol=1e-6)


@pytest.mark.parametrize("index", [0, 5, 7, 8])
def test_pictures(index: int) -> None:
    c2w = np.load(GOLDEN / "c2w.npy")
    frame = np.full((352, 640, 3), 120, np.uint8)
    painted = UpstreamPainter(c2w, 352, 640).paint(frame, index).astype(int)
    expected = np.asarray(Image.open(GOLDEN / f"frame_{index:02d}.png")).astype(int)
    assert np.abs(painted - expected).max() <= 4
    assert np.abs(expected - 120).max() > 100 and (frame == 120).all()


def test_strafing_lights_a_and_d_whatever_key_caused_it() -> None:
    assert upstream_motion(actions_to_c2w("j-8")).keys[2].tolist() == [False, True, False, False]
    turning = upstream_motion(actions_to_c2w("a-8"))
    assert not turning.keys.any() and turning.yaw[-1] < -0.9


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 128), (704, 1280)])
def test_all_sizes_and_a_single_pose(height: int, width: int) -> None:
    frame = np.full((height, width, 3), 100, np.uint8)
    for c2w in (np.eye(4)[None], actions_to_c2w("wa-3")):
        painted = list(UpstreamPainter(c2w, height, width).paint_all(iter([frame] * len(c2w))))
        assert len(painted) == len(c2w) and all(p.shape == frame.shape for p in painted)
        assert (painted[0] != frame).any()
    with pytest.raises(ValueError, match="expected uint8"):
        UpstreamPainter(c2w, height, width).paint(frame[:-1], 0)
