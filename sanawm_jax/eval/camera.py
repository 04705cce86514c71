"""Camera accuracy: how far estimated poses are from the true ones, after alignment.

    python -m sanawm_jax.eval camera --truth A.npy --estimate B.npy --json FILE

The steps are those of the pose evaluation of NVlabs/Sana's SANA-WM-Bench. Numpy only.

Axis letters: N poses.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from sanawm_jax.camera.poses import load_c2w, relative_to_first
from sanawm_jax.eval.files import write_json
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError


class CameraErrors(NamedTuple):
    """Errors of N poses, and their means.

    Attributes:
      rotation: (N,) angle between true and estimated rotation, degrees.
      translation: (N,) distance of the camera centres, in the units of the truth.
      matrix: (N,) Euclidean norm of the difference of the 12 entries of [R | t].
    """

    rotation: np.ndarray
    translation: np.ndarray
    matrix: np.ndarray

    def means(self) -> dict[str, float]:
        """RotErr in degrees, TransErr and CamMC, as the benchmark averages them: over poses."""
        return {
            "rot_err_deg": float(self.rotation.mean()),
            "trans_err": float(self.translation.mean()),
            "cam_mc": float(self.matrix.mean()),
        }


def pair_poses(
    truth: np.ndarray, estimate: np.ndarray, interval: int = 1, skip_first_frame: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Selects the poses that are compared, and makes both sequences relative to their first pose.

    Args:
      truth: (F, 4, 4) true poses, one per frame of the video.
      estimate: estimated poses, of every frame or already of every `interval`-th one: at most
        ceil(F / interval) poses count as the second. The longer sequence is cut to the shorter.
      interval: every how many frames a pose is compared; the benchmark takes 4.
      skip_first_frame: leave out the first pose of both. It belongs to the given image, which a
        refiner does not change.

    Returns:
      truth and estimate, (N, 4, 4) float32 each; the first poses are the identity.

    Raises:
      InputError: the interval is not positive, or fewer than two poses remain.
    """
    if interval < 1:
        raise InputError(f"--interval={interval} must be at least 1")
    sampled = truth[::interval]
    if len(estimate) > len(sampled):
        estimate = estimate[::interval]
    count = min(len(sampled), len(estimate))
    pair = sampled[int(skip_first_frame) : count], estimate[int(skip_first_frame) : count]
    if len(pair[0]) < 2:
        raise InputError(
            f"{len(truth)} true and {len(estimate)} estimated poses leave {len(pair[0])} to "
            "compare; at least 2 are needed"
        )
    return relative_to_first(pair[0]), relative_to_first(pair[1])


def align(truth: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Moves the estimate onto the truth by one rotation, one scale and one translation.

    The rotation is the orthogonal matrix nearest to the mean of `R_true R_estimate^T`. Scale and
    translation are those of a least-squares fit of the camera centres. For this fit, every true
    centre is expressed in the estimate's world by the rotations of its own frame. The fit follows
    the reference, which fits the translations of world-to-camera matrices.

    Args:
      truth, estimate: (N, 4, 4) camera to world.

    Returns:
      The moved estimate, (N, 4, 4) float64.
    """
    truth, estimate = truth.astype(np.float64), estimate.astype(np.float64)
    true_rotation, rotation = truth[:, :3, :3], estimate[:, :3, :3]
    centre = estimate[:, :3, 3]
    between = true_rotation @ rotation.transpose(0, 2, 1)  # the estimate's world to the true one
    left, _, right = np.linalg.svd(between.mean(0))
    turn = left @ right
    target = np.einsum("nji,nj->ni", between, truth[:, :3, 3])
    offset, target_offset = centre - centre.mean(0), target - target.mean(0)
    scale = (offset * target_offset).mean() / max(np.square(offset).mean(), 1e-9)
    moved = np.tile(np.eye(4), (len(estimate), 1, 1))
    moved[:, :3, :3] = turn @ rotation
    moved[:, :3, 3] = (scale * offset + target.mean(0)) @ turn.T
    return moved


def rotation_angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angle between rotations (..., 3, 3), which broadcast, in degrees: (...).

    From |A - B|^2 = 8 sin^2(angle / 2). Unlike the arc cosine of the trace, this form does not turn
    the rounding of equal rotations into an angle.
    """
    gap = a.astype(np.float64) - b.astype(np.float64)
    half_sine = np.linalg.norm(gap, axis=(-2, -1)) / np.sqrt(8.0)
    return np.degrees(2.0 * np.arcsin(np.minimum(half_sine, 1.0)))


def camera_errors(truth: np.ndarray, aligned: np.ndarray) -> CameraErrors:
    """Errors of aligned poses: two arrays (N, 4, 4), camera to world."""
    gap = aligned[:, :3].astype(np.float64) - truth[:, :3].astype(np.float64)
    return CameraErrors(
        rotation_angle(aligned[:, :3, :3], truth[:, :3, :3]),
        np.linalg.norm(gap[:, :, 3], axis=-1),
        np.linalg.norm(gap, axis=(1, 2)),
    )


def camera_accuracy(
    truth: np.ndarray, estimate: np.ndarray, interval: int = 1, skip_first_frame: bool = False
) -> dict[str, float]:
    """All steps: `pair_poses`, `align`, `camera_errors`, and their means.

    Returns:
      rot_err_deg, trans_err, cam_mc, and poses, the number of compared poses.

    Raises:
      InputError: see `pair_poses`.
    """
    pair = pair_poses(truth, estimate, interval, skip_first_frame)
    errors = camera_errors(pair[0], align(*pair))
    return {**errors.means(), "poses": len(pair[0])}


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(
        prog="sanawm_jax.eval camera",
        description="Errors of estimated camera poses after alignment with the true ones.",
    )
    parser.add_argument("--truth", required=True, help=".npy of true poses (F, 4, 4), c2w")
    parser.add_argument("--estimate", required=True, help=".npy of estimated poses, c2w")
    parser.add_argument(
        "--interval", type=int, default=1, help="compare every n-th frame; the benchmark takes 4"
    )
    parser.add_argument(
        "--skip_first_frame", action="store_true", help="leave out the pose of the given image"
    )
    parser.add_argument("--json", required=True, help="write the errors to this file")
    options = parser.parse_args(argv)
    try:
        truth, estimate = load_c2w(options.truth), load_c2w(options.estimate)
        found = camera_accuracy(truth, estimate, options.interval, options.skip_first_frame)
        write_json(options.json, found)
    except InputError as error:
        fail(str(error))
    print(
        f"rotation {found['rot_err_deg']:.4f} degrees, translation {found['trans_err']:.4f}, "
        f"CamMC {found['cam_mc']:.4f} over {found['poses']} poses"
    )


if __name__ == "__main__":
    main()
