"""Pose files: which are accepted, and the error message of each bad one."""

from __future__ import annotations

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w, parse_actions
from sanawm_jax.camera.poses import keys_from_poses, load_c2w, relative_to_first, snap_num_frames
from sanawm_jax.runtime.errors import InputError


def random_poses(rng: np.random.Generator, frames: int) -> np.ndarray:
    rotation, _ = np.linalg.qr(rng.normal(size=(frames, 3, 3)))
    rotation[:, :, 0] *= np.linalg.det(rotation)[:, None]
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, :3] = rotation
    poses[:, :3, 3] = rng.normal(size=(frames, 3))
    return poses


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_reads_files_and_arrays(tmp_path, rng, dtype):
    poses = random_poses(rng, 5).astype(dtype)
    np.save(tmp_path / "path.npy", poses)
    for value in (poses, tmp_path / "path.npy", str(tmp_path / "path.npy"), poses.tolist()):
        c2w = load_c2w(value)
        assert c2w.dtype == np.float32
        np.testing.assert_array_equal(c2w, poses.astype(np.float32))


def test_integer_poses_are_fine():
    np.testing.assert_array_equal(load_c2w(np.eye(4, dtype=np.int64)[None]), np.eye(4)[None])


def test_unreadable_files(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "zip.npz", a=np.eye(4)[None])
    (tmp_path / "text.npy").write_text("1 0 0 0")
    (tmp_path / "nothing.npy").write_bytes(b"")
    np.save(tmp_path / "whole.npy", np.eye(4)[None])
    (tmp_path / "short.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-8])
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'shape': ((((" + b" " * 9)
    for name in ("pickled.npy", "zip.npz", "text.npy", "nothing.npy", "short.npy", "header.npy"):
        with pytest.raises(InputError, match=r"not a plain \.npy"):
            load_c2w(tmp_path / name)
    for name in (tmp_path / "absent.npy", tmp_path):
        with pytest.raises(InputError, match="cannot open"):
            load_c2w(name)


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (3, 3, 4), (3, 4, 3), (1, 2, 4, 4), (16,)])
def test_wrong_shapes(shape):
    with pytest.raises(InputError, match="expected shape"):
        load_c2w(np.zeros(shape))


@pytest.mark.parametrize("array", [np.eye(4)[None] * 1j, np.eye(4)[None] > 0, np.array(["a"])])
def test_wrong_dtypes(array):
    with pytest.raises(InputError, match="real numbers"):
        load_c2w(array)


def test_ragged_lists():
    with pytest.raises(InputError, match="unequal"):
        load_c2w([[[1.0, 2.0], [3.0]]])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_not_finite_names_the_frame(rng, value):
    poses = random_poses(rng, 6)
    poses[[2, 4], 1, 3] = value
    with pytest.raises(InputError, match="row 2 "):
        load_c2w(poses)


def spoil(poses: np.ndarray, how: str) -> None:
    match how:
        case "scaled":
            poses[3, :3, :3] *= 1.001
        case "sheared":
            poses[3, :3, 0] += 0.01 * poses[3, :3, 1]
        case "mirrored":
            poses[3, :3, 0] *= -1
        case "huge":
            poses[3, :3, :3] *= 1e38
        case "bottom row":
            poses[3, 3, 0] = 0.01
        case "transposed":
            poses[3] = poses[3].T


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("scaled", "remove scale"),
        ("sheared", "remove scale"),
        ("mirrored", "mirror"),
        ("huge", "remove scale"),
        ("bottom row", "0 0 0 1"),
        ("transposed", "transposed"),
    ],
)
def test_not_rigid_names_the_first_bad_frame(rng, how, says):
    poses = random_poses(rng, 6)
    spoil(poses, how)
    poses[5, :3, :3] = 0
    with pytest.raises(InputError, match=f"frame 3 .*{says}"):
        load_c2w(poses)


def test_small_rounding_errors_pass(rng):
    poses = random_poses(rng, 4)
    poses[:, :3, :3] += rng.uniform(-1e-4, 1e-4, size=(4, 3, 3))
    assert load_c2w(poses).shape == (4, 4, 4)


def test_relative_to_first(rng):
    poses = random_poses(rng, 7)
    relative = relative_to_first(poses)
    np.testing.assert_array_equal(relative[0], np.eye(4))
    np.testing.assert_allclose(relative, np.linalg.inv(poses[0]) @ poses, atol=1e-6)


def test_relative_to_first_keeps_accuracy_far_from_the_origin(rng):
    poses = random_poses(rng, 7)
    near = relative_to_first(poses)
    poses[:, :3, 3] += 2.0**20
    np.testing.assert_allclose(relative_to_first(poses), near, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "bound", "expected"),
    [
        *[(161, None, 161), (164, None, 161), (165, None, 169), (166, None, 169)],
        *[(165, 168, 161), (165, 169, 169), (1, None, 1), (4, None, 1), (5, None, 9), (5, 8, 1)],
        *[(0, None, 1), (-7, None, 1), (962, 961, 961)],
    ],
)
def test_snap_num_frames(n, bound, expected):
    assert snap_num_frames(n, upper_bound=bound) == expected


@pytest.mark.parametrize("mapping", ["sana", "diffusers"])
def test_keys_from_poses_recovers_single_keys(mapping):
    text = ",".join(f"{key}-6" for key in "wasdijkl")
    c2w = actions_to_c2w(text, mapping)
    assert keys_from_poses(c2w, mapping) == parse_actions(text)


def test_keys_from_poses_recovers_combinations_in_any_world_frame(rng):
    text = "w-5,wa-5,wdi-5,sj-5,none-3,k-5"
    c2w = random_poses(rng, 1) @ actions_to_c2w(text, "diffusers")
    assert keys_from_poses(c2w, "diffusers") == parse_actions(text)


def test_keys_from_poses_lets_coasting_fade():
    keys = keys_from_poses(actions_to_c2w("w-10,none-60"))
    assert keys[9] == {"w"}
    assert keys[12] == {"w"}
    assert not any(keys[40:])


def test_keys_from_poses_of_a_still_or_single_camera():
    assert keys_from_poses(np.eye(4)[None]) == []
    assert keys_from_poses(np.tile(np.eye(4), (4, 1, 1))) == [frozenset()] * 3
