"""The control overlay: the pressed keys light up, and no other pixels of the frame change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w, parse_actions
from sanawm_jax.media.overlay import OverlayLayout, OverlayPainter, draw_overlay

SIZES = [(704, 1280), (1280, 704), (256, 256), (128, 128), (96, 160), (64, 64), (57, 301)]


def grey(frames: int, height: int, width: int) -> np.ndarray:
    return np.full((frames, height, width, 3), 120, dtype=np.uint8)


def boxes(height: int, width: int) -> dict[str, tuple[slice, slice]]:
    """Returns the place of each key and of the map."""
    layout = OverlayLayout.for_frame(height, width)
    top = height - layout.margin - layout.keys_size[1]
    found = {}
    for key in "wasdijkl":
        x, y = layout.cap_corner(key)
        x, y = x + layout.margin, y + top
        found[key] = np.s_[y : y + layout.cap, x : x + layout.cap]
    if layout.map_side:
        low, high = layout.margin + layout.map_side, layout.margin
        found["map"] = np.s_[height - low : height - high, width - low : width - high]
    return found


def is_yellow(patch: np.ndarray) -> np.ndarray:
    return (patch[..., 0] > 200) & (patch[..., 1] > 150) & (patch[..., 2] < 110)


def lit_keys(frame: np.ndarray) -> set[str]:
    places = boxes(*frame.shape[:2])
    return {k for k in "wasdijkl" if is_yellow(frame[places[k]]).mean() > 0.3}


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_held_keys_light_up_one_frame_later(height, width):
    text = "w-1,ad-1,ijkl-1,none-1,s-1"
    c2w = actions_to_c2w(text)
    painter = OverlayPainter(c2w, parse_actions(text), height, width)
    frame = grey(1, height, width)[0]
    found = [lit_keys(painter.paint(frame, i)) for i in range(6)]
    assert found == [set(), {"w"}, {"a", "d"}, set("ijkl"), set(), {"s"}]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_everything_fits_and_nothing_overlaps(height, width):
    places = boxes(height, width)
    cover = np.zeros((height, width), dtype=int)
    for box in places.values():
        before = cover.sum()
        cover[box] += 1
        y, x = box
        assert cover.sum() - before == (y.stop - y.start) * (x.stop - x.start) > 0
        assert min(y.start, x.start) >= 1
    assert cover.max() == 1
    assert cover.mean() < 0.2, "the overlay must leave the picture visible"
    painted = draw_overlay(grey(2, height, width), actions_to_c2w("wdi-1"))
    np.testing.assert_array_equal(painted[:, cover == 0], 120)


def test_the_overlay_is_half_transparent():
    place = boxes(128, 128)["s"]
    c2w = actions_to_c2w("w-1")
    dark, bright = (
        draw_overlay(np.full((2, 128, 128, 3), v, dtype=np.uint8), c2w)[1][place] for v in (0, 255)
    )
    difference = bright.astype(int) - dark
    assert 40 < np.median(difference) < 200


@pytest.mark.parametrize("mapping", ["sana", "diffusers"])
def test_keys_are_inferred_from_the_poses(mapping):
    text = "w-4,d-4,j-4"
    painted = draw_overlay(grey(13, 128, 128), actions_to_c2w(text, mapping), None, mapping)
    assert [lit_keys(painted[i]) for i in (1, 4, 5, 8, 9, 12)] == [
        {"w"}, {"w"}, {"d"}, {"d"}, {"j"}, {"j"},
    ]  # fmt: skip


def test_missing_entries_are_dark_and_surplus_ones_ignored():
    c2w = actions_to_c2w("w-3")
    short = draw_overlay(grey(4, 128, 128), c2w, parse_actions("w-1"))
    assert [lit_keys(frame) for frame in short] == [set(), {"w"}, set(), set()]
    long = draw_overlay(grey(4, 128, 128), c2w, parse_actions("w-9"))
    assert [lit_keys(frame) for frame in long] == [set(), {"w"}, {"w"}, {"w"}]


@pytest.mark.parametrize(("height", "width"), [(704, 1280), (128, 128)])
def test_the_travelled_part_of_the_map_grows(height, width):
    c2w = actions_to_c2w("w-40,wd-40")
    painter = OverlayPainter(c2w, [], height, width)
    place, frame = boxes(height, width)["map"], grey(1, height, width)[0]
    travelled = [is_yellow(painter.paint(frame, i)[place]).sum() for i in (0, 30, 55, 80)]
    assert all(a < b for a, b in itertools.pairwise(travelled))


@pytest.mark.parametrize(
    ("key", "side"), [("w", (-1, 0)), ("s", (1, 0)), ("l", (0, 1)), ("j", (0, -1))]
)
def test_the_map_points_the_right_way(key, side):
    # The white arrow ends up where the camera went: ahead is up, right is right.
    painted = draw_overlay(grey(41, 128, 128), actions_to_c2w(f"{key}-40"), [])
    patch = painted[-1][boxes(128, 128)["map"]]
    centre = (
        np.argwhere(patch.min(axis=-1) > 235).mean(axis=0) - (np.array(patch.shape[:2]) - 1) / 2
    )
    np.testing.assert_array_equal(np.round(centre / 15), side)


def test_still_steep_and_single_cameras_can_be_drawn():
    down = np.eye(4)
    down[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    for c2w in (np.tile(np.eye(4), (3, 1, 1)), np.eye(4)[None], np.stack([np.eye(4), down])):
        painted = draw_overlay(grey(len(c2w), 128, 128), c2w)
        assert (painted[-1][boxes(128, 128)["map"]].min(axis=-1) > 235).sum() > 10


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 20), (40, 300), (55, 55)])
def test_tiny_frames_stay_as_they_are(height, width):
    frames = grey(3, height, width)
    np.testing.assert_array_equal(draw_overlay(frames, actions_to_c2w("w-2")), frames)


def test_a_stream_equals_the_array_and_the_input_is_kept(rng):
    frames = rng.integers(0, 256, size=(4, 96, 160, 3), dtype=np.uint8)
    frames.flags.writeable = False
    c2w = actions_to_c2w("wa-3")
    painter = OverlayPainter(c2w, None, 96, 160)
    np.testing.assert_array_equal(list(painter.paint_all(iter(frames))), draw_overlay(frames, c2w))


def test_bad_input():
    c2w = actions_to_c2w("w-2")
    with pytest.raises(ValueError, match="4 frames need as many poses, got 3"):
        draw_overlay(grey(4, 64, 64), c2w)
    with pytest.raises(ValueError, match="expected uint8"):
        draw_overlay(grey(3, 64, 64).astype(np.float32), c2w)
