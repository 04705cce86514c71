"""Camera and image preparation against diffusers' SANA-WM pipeline."""

from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers.pipelines.sana_wm import cam_utils
from diffusers.pipelines.sana_wm.image_processor import SanaWMImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sanawm_jax.camera.actions import actions_to_c2w, parse_actions
from sanawm_jax.camera.intrinsics import crop_intrinsics
from sanawm_jax.camera.poses import snap_num_frames
from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.media.image import resize_and_center_crop, to_array
from sanawm_jax.runtime.errors import InputError

few = settings(max_examples=60, deadline=None)

key_sets = st.text(alphabet="wasdijklWASDIJKL", max_size=5) | st.just("none")
counts = st.integers(1, 60).map(str) | st.just("007")
segments = st.tuples(key_sets, counts).map("-".join)
action_strings = st.lists(segments, min_size=1, max_size=5).map(" , ".join)


@few
@given(action_strings, st.none() | st.floats(0.001, 10), st.none() | st.floats(0.01, 50))
def test_action_paths_are_equal_bit_for_bit(text, speed, degrees):
    given_speeds = {"translation_speed": speed, "rotation_speed_deg": degrees}
    kwargs = {name: value for name, value in given_speeds.items() if value is not None}
    expected = cam_utils.action_string_to_c2w(text, **kwargs)
    found = actions_to_c2w(text, "diffusers", **kwargs)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="wasx-,0129. \uff0c\u00b2\n", max_size=8) | st.text(max_size=6))
def test_the_same_strings_are_refused(text):
    try:
        expected = [frozenset(keys) for keys in cam_utils._parse_action_string(text)]
    except ValueError:
        expected = None
    if expected is not None and len(expected) > 1000:
        return
    if expected is None:
        with pytest.raises(InputError):
            parse_actions(text)
    else:
        assert parse_actions(text) == expected


def test_snapped_frame_counts_are_equal():
    for stride in (1, 2, 4, 5, 8):
        for n in range(-2, 60):
            for bound in (None, n, *range(max(n - 6, 0), n + 12)):
                expected = cam_utils.snap_num_frames(n, stride, upper_bound=bound)
                assert snap_num_frames(n, stride, bound) == expected, (n, stride, bound)


def random_path(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Returns random smooth poses with a random start."""
    start, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    start[:, 0] *= np.linalg.det(start)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    for i in range(frames):
        axis = rng.normal(size=3) * 0.05
        x, y, z = axis
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        angle = np.linalg.norm(axis)
        turn = (
            np.eye(3)
            + math.sin(angle) / angle * cross
            + (1 - math.cos(angle)) / angle**2 * cross @ cross
        )
        start = start @ turn
        poses[i, :3, :3] = start
        poses[i, :3, 3] = rng.normal(size=3) * 0.5
    return poses.astype(np.float32)


@pytest.mark.parametrize("frames", [1, 3, 8, 9, 17, 20, 41])
@pytest.mark.parametrize(
    ("size", "stride"), [((96, 160), (8, 32)), ((70, 101), (8, 32)), ((64, 48), (4, 16))]
)
def test_camera_conditions(rng, frames, size, stride):
    height, width = size
    c2w = random_path(rng, frames)
    focal = rng.uniform(0.5, 1.5, size=(frames, 2)) * width
    centre = rng.uniform(0.3, 0.7, size=(frames, 2)) * [width, height]
    rows = np.concatenate([focal, centre], axis=1).astype(np.float32)
    expected = cam_utils.prepare_camera(
        c2w, rows, target_size=size, vae_stride=(stride[0], stride[1], stride[1])
    )
    camera, plucker = camera_conditions(c2w, rows, height, width, *stride)
    np.testing.assert_allclose(camera, expected["raymap"].numpy(), atol=1e-6, rtol=1e-6)
    reference = expected["chunk_plucker"].numpy().transpose(1, 2, 3, 0)
    assert plucker.shape == reference.shape
    np.testing.assert_allclose(plucker, reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "src", [(1280, 704), (640, 480), (333, 777), (1921, 1081), (47, 31), (1, 3)]
)
@pytest.mark.parametrize(("height", "width"), [(96, 160), (64, 32)])
def test_image_and_intrinsics_follow_the_crop(rng, src, height, width):
    image = Image.fromarray(rng.integers(0, 256, size=(src[1], src[0], 3), dtype=np.uint8))
    rows = rng.uniform(10, 900, size=(5, 4)).astype(np.float32)
    pixels, expected = SanaWMImageProcessor().preprocess_with_intrinsics(image, rows, height, width)
    crop, *sizes = resize_and_center_crop(image, height, width)
    assert sizes == list(cam_utils.resize_and_center_crop(image, height, width)[1:])
    np.testing.assert_array_equal(crop_intrinsics(rows, *sizes), expected)
    np.testing.assert_array_equal(to_array(crop), pixels[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("height", "width"), [(704, 1280), (97, 161), (33, 1)])
def test_crop_to_any_size(rng, height, width):
    image = Image.fromarray(rng.integers(0, 256, size=(61, 87, 3), dtype=np.uint8))
    found, expected = (
        crop(image, height, width)
        for crop in (resize_and_center_crop, cam_utils.resize_and_center_crop)
    )
    assert found[1:] == expected[1:]
    np.testing.assert_array_equal(np.asarray(found[0]), np.asarray(expected[0]))
