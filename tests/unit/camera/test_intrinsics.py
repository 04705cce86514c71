"""Intrinsics: every accepted form, resampling, fields of view."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from sanawm_jax.camera.intrinsics import (
    check_field_of_view,
    crop_intrinsics,
    default_intrinsics,
    field_of_view,
    parse_intrinsics,
)
from sanawm_jax.runtime.errors import InputError

ROW = np.array([800.0, 780.0, 640.0, 352.0])


def matrix(row: np.ndarray) -> np.ndarray:
    fx, fy, cx, cy = row
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


@pytest.mark.parametrize(
    "value",
    [ROW, ROW[None], ROW.tolist(), matrix(ROW), matrix(ROW)[None], "800, 780,640,352.0"],
    ids=["(4,)", "(1,4)", "list", "(3,3)", "(1,3,3)", "text"],
)
def test_one_entry_serves_every_frame(value):
    rows = parse_intrinsics(value, 9)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.tile(ROW, (9, 1)).astype(np.float32))


def test_reads_a_file(tmp_path):
    np.save(tmp_path / "a,b.npy", ROW)  # an existing file is not a list of numbers
    for path in (tmp_path / "a,b.npy", str(tmp_path / "a,b.npy")):
        np.testing.assert_array_equal(parse_intrinsics(path, 1)[0], ROW.astype(np.float32))


@pytest.mark.parametrize("as_matrix", [False, True])
def test_longer_sequences_are_cut(rng, as_matrix):
    rows = rng.uniform(100, 900, size=(12, 4))
    value = np.stack([matrix(row) for row in rows]) if as_matrix else rows
    np.testing.assert_array_equal(parse_intrinsics(value, 9), rows[:9].astype(np.float32))


def test_shorter_sequences_are_resampled_over_normalised_time():
    rows = np.array([[100, 200, 10, 20], [300, 100, 30, 20], [500, 300, 50, 80.0]])
    found = parse_intrinsics(rows, 9)
    np.testing.assert_allclose(found[[0, 4, 8]], rows)
    np.testing.assert_allclose(found[2], [200, 150, 20, 20])
    np.testing.assert_allclose(found[6], [400, 200, 40, 50])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.ones(3), "expected shape"),
        (np.ones((4, 3)), "expected shape"),
        (np.ones((2, 4, 4)), "expected shape"),
        (np.ones((0, 4)), "expected shape"),
        (np.ones((1, 2, 3, 3)), "expected shape"),
        (np.float64(3), "expected shape"),
        (ROW * [np.nan, 1, 1, 1], "NaN"),
        (ROW * [1, 1, np.inf, 1], "NaN, infinity"),
        (ROW * [0, 1, 1, 1], "must be positive"),
        (ROW * [1, -1, 1, 1], "must be positive"),
        (np.stack([ROW, ROW * -1]), "frame 1 has fx=-800"),
        ("1,2,3", "four numbers"),
        ("1,2,3,4,5", "four numbers"),
        ("a,b,c,d", "four numbers"),
        ("1,2,,4", "four numbers"),
        ("nan,2,3,4", "NaN"),
        ("absent.npy", "cannot open"),
    ],
)
def test_bad_values(value, says):
    with pytest.raises(InputError, match=says):
        parse_intrinsics(value, 2)


def test_field_of_view_of_known_cameras():
    # f = w / 2 sees 90 degrees; f = h / 2 / tan(30 degrees) sees 60.
    row = np.array([640, 352 / np.tan(np.radians(30)), 640, 352])
    np.testing.assert_allclose(field_of_view(row, 1280, 704), [90, 60])
    assert field_of_view(np.tile(row, (5, 1)), 1280, 704).shape == (5, 2)


@pytest.mark.parametrize("fov", [30.0, 70.0, 110.0])
def test_default_has_the_stated_field_of_view(fov):
    row = default_intrinsics(1280, 704, fov)
    assert field_of_view(row, 1280, 704)[0] == pytest.approx(fov, abs=1e-4)
    assert row[0] == row[1]
    np.testing.assert_array_equal(row[2:], [640, 352])


@pytest.mark.parametrize("fov", [0, -5, 180, np.nan])
def test_default_refuses_impossible_fields_of_view(fov):
    with pytest.raises(InputError, match="impossible"):
        default_intrinsics(1280, 704, fov)


@pytest.mark.parametrize("size", [(1280, 704), (704, 1280), (512, 512), (640, 480), (4000, 2250)])
def test_the_default_passes_its_own_check(size):
    check_field_of_view(default_intrinsics(*size), *size, is_given=False)


@pytest.mark.parametrize("size", [(4000, 1000), (1000, 4000)])
def test_extreme_shapes_fail_the_check(size):
    with pytest.raises(InputError, match="--intrinsics"):
        check_field_of_view(default_intrinsics(*size), *size, is_given=False)


@pytest.mark.parametrize("fov", [25.0, 24.0, 120.0, 130.0])
def test_bounds_are_excluded_and_given_ones_only_warn(fov):
    focal = 500 / np.tan(np.radians(fov) / 2)
    rows = np.stack([np.full(4, 500.0), [focal, 500, 500, 500]])
    # A hair beyond the bound, so that rounding cannot decide.
    rows[1, 0] *= 1 + 1e-9 if fov <= 25 else 1 - 1e-9
    with pytest.raises(InputError, match="outside"):
        check_field_of_view(rows, 1000, 1000, is_given=False)
    with pytest.warns(UserWarning, match="outside"):
        check_field_of_view(rows, 1000, 1000, is_given=True)


@pytest.mark.parametrize("is_given", [True, False])
def test_usual_fields_of_view_are_silent(is_given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_field_of_view(ROW, 1280, 704, is_given=is_given)


def test_crop_moves_points_with_the_image(rng):
    # A 3-D point lands on the same spot whether it is projected before or after the crop.
    src, resized, offset = (640, 480), (960, 720), (30, 8)
    point = np.array([0.3, -0.2, 2.0])
    before, after = ROW, crop_intrinsics(ROW, src, resized, offset)
    spot = before[:2] * point[:2] / point[2] + before[2:]
    expected = spot * np.array(resized) / src - offset
    np.testing.assert_allclose(after[:2] * point[:2] / point[2] + after[2:], expected)
    np.testing.assert_array_equal(before, ROW)
