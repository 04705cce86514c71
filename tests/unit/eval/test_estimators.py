"""Poses from files and from structure from motion, and failures as rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.estimators import (
    Estimate,
    EstimateError,
    camera_row,
    from_file,
    structure_from_motion,
)
from sanawm_jax.runtime.errors import InputError

VIDEO = np.zeros((33, 8, 8, 3), np.uint8)


@pytest.fixture
def truth() -> np.ndarray:
    return actions_to_c2w("wd-32")


def test_poses_of_another_program(tmp_path: Path, truth: np.ndarray) -> None:
    np.savez(tmp_path / "all.npz", c2w=truth)
    np.savez(tmp_path / "some.npz", c2w=truth[::4][:5], frames=np.arange(0, 20, 4))
    np.save(tmp_path / "all.npy", truth)
    for name, poses in (("all.npz", 9), ("all.npy", 9), ("some.npz", 5)):
        row = camera_row(from_file(tmp_path / name), VIDEO, truth)
        assert row["poses"] == poses and row["asked"] == 9 and row["rot_err_deg"] < 1e-4
    skipped = camera_row(from_file(tmp_path / "all.npz"), VIDEO, truth, skip_first_frame=True)
    assert skipped["poses"] == skipped["asked"] == 8
    # poses are matched by the number of the frame, not by their order
    np.savez(tmp_path / "late.npz", c2w=truth[16:], frames=np.arange(16, 33))
    row = camera_row(from_file(tmp_path / "late.npz"), VIDEO, truth)
    assert row["poses"] == 5 and row["rot_err_deg"] < 1e-4


def test_a_failure_is_a_row(tmp_path: Path, truth: np.ndarray) -> None:
    def fails(video: np.ndarray, frames: np.ndarray) -> Estimate:
        raise EstimateError("no features")

    assert camera_row(fails, VIDEO, truth) == {"asked": 9, "poses": 0, "error": "no features"}
    np.savez(tmp_path / "one.npz", c2w=truth[:1], frames=np.array([3]))
    row = camera_row(from_file(tmp_path / "one.npz"), VIDEO, truth)
    assert row["poses"] == 0 and "poses of 0 of 9 frames" in row["error"]
    # a flat gray video has no features
    pytest.importorskip("pycolmap")
    row = camera_row(structure_from_motion("global"), np.full_like(VIDEO, 99), truth)
    assert row["poses"] == 0 and "pycolmap" in row["error"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [({"poses": np.eye(4)}, "no array c2w"), ({"c2w": np.eye(4)}, "expected shape")],
)
def test_bad_files(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=words):
        from_file(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("poses")
    with pytest.raises(InputError, match=r"text\.npz"):
        from_file(tmp_path / "text.npz")
    with pytest.raises(InputError, match="nowhere"):
        from_file(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "short.npz", c2w=np.tile(np.eye(4), (3, 1, 1)), frames=np.arange(2))
    with pytest.raises(InputError, match="3 poses and 2 frame numbers"):
        from_file(tmp_path / "short.npz")


def test_an_unknown_mapping() -> None:
    with pytest.raises(InputError, match="unknown mapping 'other'"):
        structure_from_motion("other")


def checkered_room(pose: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """A room of random tiles, (96, 128, 3) uint8."""
    fx, fy, cx, cy = intrinsics
    y, x = np.mgrid[:96, :128]
    rays = np.stack(((x - cx) / fx, (y - cy) / fy, np.ones(x.shape)), -1) @ pose[:3, :3].T
    far = (np.sign(rays) * (2.0, 1.2, 3.0) - pose[:3, 3]) / np.where(rays == 0, 1e-9, rays)
    point = pose[:3, 3] + far.min(-1)[..., None] * rays
    cell = np.floor(point * 4 + 0.01).astype(int) + 40
    tiles = np.random.default_rng(0).integers(30, 225, (80, 80, 80, 3), dtype=np.uint8)
    return tiles[cell[..., 0], cell[..., 1], cell[..., 2]]


@pytest.mark.parametrize("mapping", ["incremental", "global"])
def test_structure_from_motion_with_fixed_intrinsics(mapping: str) -> None:
    pytest.importorskip("pycolmap")
    truth = actions_to_c2w("dl-32")
    intrinsics = np.array((90.0, 90.0, 63.5, 47.5))
    video = np.stack([checkered_room(pose, intrinsics) for pose in truth])
    row = camera_row(structure_from_motion(mapping, intrinsics, scale=2), video, truth)
    assert row["poses"] == 9, row
    assert row["rot_err_deg"] < 0.5 and row["trans_err"] < 0.02
    wrong = intrinsics * (1.5, 1.5, 1, 1)
    other = camera_row(structure_from_motion(mapping, wrong, scale=2), video, truth)
    assert other.get("rot_err_deg", 99) > 2 * row["rot_err_deg"]  # the given ones were used
