"""Camera errors: invariances, known perturbations, the reference's formulas, and evo."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval import camera
from sanawm_jax.eval.__main__ import main as dispatch
from sanawm_jax.runtime.errors import InputError


@pytest.fixture
def truth() -> np.ndarray:
    return actions_to_c2w("w-20,dw-20,ik-4,jl-3,aw-24,li-10").astype(np.float64)


def pose(degrees: tuple[float, float, float], position: tuple[float, float, float]) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("yxz", degrees, degrees=True).as_matrix()
    out[:3, 3] = position
    return out


def perturb(poses: np.ndarray, rng: np.random.Generator, degrees: float, size: float) -> np.ndarray:
    out = poses.copy()
    turn = Rotation.from_rotvec(np.radians(degrees) * rng.normal(size=(len(poses), 3)))
    out[:, :3, :3] = turn.as_matrix() @ poses[:, :3, :3]
    out[:, :3, 3] += size * rng.normal(size=(len(poses), 3))
    return out


def scaled(poses: np.ndarray, scale: float) -> np.ndarray:
    out = poses.copy()
    out[:, :3, 3] *= scale
    return out


def reference(truth: np.ndarray, estimate: np.ndarray) -> tuple[float, float, float]:
    """The same errors, written with world-to-camera matrices as the reference defines them."""
    true_w2c, w2c = np.linalg.inv(truth)[:, :3], np.linalg.inv(estimate)[:, :3]
    cov = np.mean([t[:, :3].T @ e[:, :3] for t, e in zip(true_w2c, w2c, strict=True)], 0)
    u, _, vt = np.linalg.svd(cov)
    turn = (u @ vt).T
    a = np.stack([e[:, :3].T @ e[:, 3] for e in w2c])
    b = np.stack([e[:, :3].T @ t[:, 3] for t, e in zip(true_w2c, w2c, strict=True)])
    ac, bc = a - a.mean(0), b - b.mean(0)
    s = (ac * bc).mean() / max((ac * ac).mean(), 1e-9)
    shift = b.mean(0) - s * a.mean(0)
    rotation, translation, matrix = [], [], []
    for t, e in zip(truth, w2c, strict=True):
        moved = np.eye(4)
        moved[:3, :3], moved[:3, 3] = e[:, :3] @ turn, e[:, :3] @ shift + s * e[:, 3]
        moved = np.linalg.inv(moved)
        trace = np.trace(t[:3, :3].T @ moved[:3, :3])
        rotation.append(np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))))
        translation.append(np.linalg.norm(t[:3, 3] - moved[:3, 3]))
        matrix.append(np.linalg.norm((t - moved)[:3]))
    return float(np.mean(rotation)), float(np.mean(translation)), float(np.mean(matrix))


def test_equals_the_reference_formulas(truth: np.ndarray, rng: np.random.Generator) -> None:
    estimate = scaled(perturb(truth, rng, 8.0, 0.1), 3.0)
    found = camera.camera_errors(truth, camera.align(truth, estimate)).means()
    np.testing.assert_allclose(list(found.values()), reference(truth, estimate), rtol=1e-6)
    assert found["rot_err_deg"] > 3 and found["trans_err"] > 0.05


def test_rigid_motion_and_scale_of_the_estimate_change_nothing(
    truth: np.ndarray, rng: np.random.Generator
) -> None:
    estimate = perturb(truth, rng, 5.0, 0.05)
    moved = pose((40, -20, 10), (3, 1, -2)) @ scaled(estimate, 0.2)
    errors = [camera.camera_accuracy(truth, e) for e in (estimate, moved)]
    assert errors[0]["rot_err_deg"] > 1
    np.testing.assert_allclose(list(errors[0].values()), list(errors[1].values()), rtol=1e-4)


def test_a_perfect_estimate_has_no_error(truth: np.ndarray) -> None:
    estimate = pose((-70, 15, 5), (1, 2, 3)) @ scaled(truth, 7.0)
    found = camera.camera_accuracy(truth, estimate)
    assert max(found["rot_err_deg"] / 57, found["trans_err"], found["cam_mc"]) < 1e-5


def test_known_perturbations_give_known_errors() -> None:
    """Half of the poses turn by +6 degrees, half by -6: the mean rotation cannot absorb either."""
    truth = np.tile(np.eye(4), (8, 1, 1))
    truth[:, 0, 3] = [0, 0, 1, 1, 2, 2, 3, 3]
    estimate = truth.copy()
    signs = np.tile((1, -1), 4)
    for matrix, sign in zip(estimate, signs, strict=True):
        matrix[:3, :3] = pose((0, 0, 6 * sign), (0, 0, 0))[:3, :3]
    errors = camera.camera_errors(truth, camera.align(truth, estimate))
    np.testing.assert_allclose(errors.rotation, 6.0, atol=1e-9)
    # of centres alone: the rotations are equal
    estimate = truth.copy()
    estimate[:, 1, 3] += 0.25 * signs
    errors = camera.camera_errors(truth, camera.align(truth, estimate))
    assert errors.rotation.max() == 0
    # the fitted scale shrinks the estimate: 5 * 2 / (5 * 2 + 8 / 16)
    scale = 10 / (10 + 0.5)
    offset = np.abs(truth[:, 0, 3] - 1.5) * (1 - scale)
    np.testing.assert_allclose(errors.translation, np.hypot(offset, 0.25 * scale))
    np.testing.assert_allclose(errors.matrix, errors.translation)


def test_rotation_angle_of_small_and_large_turns() -> None:
    turns = Rotation.from_rotvec(np.radians([[0, a, 0] for a in (0, 1e-6, 30, 180)])).as_matrix()
    np.testing.assert_allclose(camera.rotation_angle(turns, turns[0]), [0, 1e-6, 30, 180])


def test_a_still_estimate_has_the_size_of_the_path_as_its_error(truth: np.ndarray) -> None:
    still = np.tile(np.eye(4), (len(truth), 1, 1))
    found = camera.camera_errors(truth, camera.align(truth, still)).means()
    assert np.isfinite(list(found.values())).all() and found["trans_err"] > 0.1


@pytest.mark.parametrize(("count", "kept"), [(97, 25), (25, 25), (20, 20), (90, 23)])
def test_interval_and_lengths(count: int, kept: int) -> None:
    """Estimates of all frames are sampled; estimates of every fourth frame already are."""
    truth = actions_to_c2w("aw-96").astype(np.float64)
    estimate = truth[:count] if count > 25 else truth[::4][:count]
    pair = camera.pair_poses(truth, estimate, 4)
    assert len(pair[0]) == len(pair[1]) == kept
    np.testing.assert_array_equal(*pair)
    skipped = camera.pair_poses(truth, estimate, 4, skip_first_frame=True)
    assert len(skipped[0]) == kept - 1
    np.testing.assert_array_equal(skipped[0][0], np.eye(4))
    expected = np.linalg.inv(truth[4]) @ truth[8]
    np.testing.assert_allclose(skipped[0][1], expected, atol=1e-6)


def test_agrees_with_evo(truth: np.ndarray, rng: np.random.Generator) -> None:
    """Errors of aligned poses are evo's APE, and both find the same scale of a similar path."""
    evo_trajectory = pytest.importorskip("evo.core.trajectory")
    from evo.core import metrics

    estimate = perturb(truth, rng, 4.0, 0.05)
    aligned = camera.align(truth, estimate)
    ours = camera.camera_errors(truth, aligned).means()
    paths = [evo_trajectory.PosePath3D(poses_se3=list(poses)) for poses in (truth, aligned)]
    for relation, name in (
        (metrics.PoseRelation.rotation_angle_deg, "rot_err_deg"),
        (metrics.PoseRelation.translation_part, "trans_err"),
    ):
        ape = metrics.APE(relation)
        ape.process_data(paths)
        np.testing.assert_allclose(ape.get_statistic(metrics.StatisticsType.mean), ours[name])
    similar = pose((25, -10, 3), (1, 0, 2)) @ scaled(truth, 0.4)
    path = evo_trajectory.PosePath3D(poses_se3=list(similar))
    _, _, scale = path.align(paths[0], correct_scale=True)
    np.testing.assert_allclose(scale, 2.5)
    np.testing.assert_allclose(camera.align(truth, similar), path.poses_se3, atol=1e-8)
    # the error from one frame to the next does not depend on the alignment of the worlds
    rpe = metrics.RPE(metrics.PoseRelation.rotation_angle_deg)
    rpe.process_data(paths)
    steps = [
        np.stack([np.linalg.inv(a) @ b for a, b in itertools.pairwise(p)])
        for p in (truth, estimate)
    ]
    np.testing.assert_allclose(rpe.error, camera.camera_errors(*steps).rotation, rtol=1e-6)


def test_command(tmp_path: Path, truth: np.ndarray, rng: np.random.Generator) -> None:
    files = [str(tmp_path / name) for name in ("a.npy", "b.npy", "out.json")]
    estimate = perturb(truth, rng, 3.0, 0.02)
    np.save(files[0], truth)
    np.save(files[1], estimate)
    base = ["camera", "--truth", files[0], "--estimate", files[1], "--json", files[2]]
    dispatch(base)
    found = json.loads(Path(files[2]).read_text())
    assert list(found) == ["rot_err_deg", "trans_err", "cam_mc", "poses"]
    assert found["poses"] == len(truth)
    dispatch([*base, "--interval", "4", "--skip_first_frame"])
    sampled = json.loads(Path(files[2]).read_text())
    assert sampled["poses"] == len(truth[::4]) - 1
    relative = [np.linalg.inv(p[4]) @ p[4::4] for p in (truth, estimate)]
    expected = reference(*relative)
    np.testing.assert_allclose(list(sampled.values())[:3], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--estimate", "/nowhere.npy"], "/nowhere.npy"),
        (["--interval", "0"], "--interval=0"),
        (["--interval", "99"], "at least 2 are needed"),
        (["--json", "/proc/nothing/a.json"], "/proc/nothing/a.json"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    truth: np.ndarray,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(tmp_path / "a.npy")
    np.save(path, truth)
    base = ["--truth", path, "--estimate", path, "--json", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit) as caught:
        camera.main([*base, *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_one_pose_cannot_be_compared(truth: np.ndarray) -> None:
    with pytest.raises(InputError, match="at least 2"):
        camera.camera_accuracy(truth, truth[:1])
