"""Measures video files, whoever made them: drift, revisits, camera, and quality against a truth.

    python -m sanawm_jax.eval videos --videos DIR --json FILE
    python -m sanawm_jax.eval videos --videos DIR --truth DIR --poses DIR --estimator colmap_global

Files belong together by their names: DIR/room.mp4, TRUTH/room.mp4, POSES/room.npy.

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.camera.pose_files import read_npz
from sanawm_jax.camera.poses import load_c2w
from sanawm_jax.eval.drift import FPS, drift
from sanawm_jax.eval.estimators import Estimator, camera_row, from_file, structure_from_motion
from sanawm_jax.eval.files import write_json
from sanawm_jax.eval.memory import Pair, revisit, revisit_pairs
from sanawm_jax.eval.metrics import by_quarter, gradient_ratio, psnr, ssim
from sanawm_jax.eval.report import write_report
from sanawm_jax.eval.runner import Clip, Metric, Row, evaluate, store_of
from sanawm_jax.eval.summary import mean
from sanawm_jax.media.video import check_writable
from sanawm_jax.media.video_reader import read_mp4, video_facts
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError

ESTIMATORS = {"colmap": "incremental", "colmap_global": "global"}
_OUTPUTS = ("json", "report")


@dataclass(frozen=True)
class VideoFile:
    """A video to measure.

    Attributes:
      name: without the ending.
      path: of the mp4.
      truth: the mp4 of the true video, or None.
      c2w: (N, 4, 4) commanded poses, or None.
      intrinsics: (4,) in pixels of the video, or None.
      pairs: pairs of frames from a benchmark's file; None finds them by the poses.
      is_refined: the video lacks the given image, so pose n belongs to frame n - 1.
    """

    name: str
    path: Path
    truth: Path | None = None
    c2w: np.ndarray | None = None
    intrinsics: np.ndarray | None = None
    pairs: list[Pair] | None = None
    is_refined: bool = False

    def check(self) -> None:
        """Compares the headers of the files, so that a bad file stops a run before it begins.

        Raises:
          InputError: the video is unreadable, or has another size or length than its truth, or too
            few poses.
        """
        facts = video_facts(self.path)
        frames, size = len(facts.times), facts.shown
        if self.truth is not None:
            true_facts = video_facts(self.truth)
            true_frames, true_size = len(true_facts.times), true_facts.shown
            if size != true_size:
                raise InputError(
                    f"{self.path} is {size[0]}x{size[1]}, its truth {self.truth} is "
                    f"{true_size[0]}x{true_size[1]}; scale one of them"
                )
            if frames != true_frames:
                raise InputError(
                    f"{self.path} has {frames} frames, its truth {self.truth} has {true_frames}; "
                    "cut one of them"
                )
        if self.c2w is not None and len(self.c2w) < frames + self.is_refined:
            raise InputError(
                f"{self.path} has {frames} frames and {len(self.c2w)} poses; give a pose per frame"
            )

    def clip(self) -> Clip:
        """Reads the files."""
        video = read_mp4(self.path)
        c2w = self.c2w
        if c2w is not None:
            c2w = c2w[int(self.is_refined) :][: len(video)]
        truth = None if self.truth is None else read_mp4(self.truth)
        facts = {"file": self}
        return Clip({"video": video}, truth, c2w, video_facts(self.path).fps or FPS, facts)


def find_videos(folder: Path, truth: Path | None, poses: Path | None) -> list[VideoFile]:
    """The mp4 files of a folder and what belongs to them.

    Raises:
      InputError: there are none, or a video has no truth or no poses.
    """
    paths = sorted(folder.glob("*.mp4"))
    if not paths:
        raise InputError(f"no .mp4 file in {folder}")
    found = []
    for path in paths:
        own = None if truth is None else truth / path.name
        if own is not None and not own.is_file():
            raise InputError(f"{path.name} has no truth {own}")
        c2w = intrinsics = None
        if poses is not None:
            files = [poses / f"{path.stem}.npz", poses / f"{path.stem}.npy"]
            file = next((f for f in files if f.is_file()), None)
            if file is None:
                raise InputError(f"{path.name} has no poses {files[0]} or {files[1].name}")
            track = read_npz(file)
            c2w = load_c2w(track.c2w)
            intrinsics = None if track.intrinsics is None else track.intrinsics[0]
        found.append(VideoFile(path.stem, path, own, c2w, intrinsics))
    return found


def changes(clip: Clip, video: np.ndarray) -> Row:
    """Drift from window to window."""
    return drift(video, clip.fps)


def quality(clip: Clip, video: np.ndarray) -> Row:
    """PSNR, SSIM and gradient-energy ratio to the truth by quarter."""
    if clip.truth is None:
        return {}
    metrics = (("psnr", psnr), ("ssim", ssim), ("gradient_ratio", gradient_ratio))
    return {f"{name}_by_quarter": by_quarter(of(video, clip.truth)) for name, of in metrics}


def revisits(clip: Clip, video: np.ndarray) -> Row:
    """Similarity of frames that show the same place, from the benchmark's pairs or by pose."""
    pairs = clip.facts["file"].pairs
    if pairs is None:
        if clip.c2w is None:
            return {}
        pairs = revisit_pairs(clip.c2w)
    rows = revisit(video, pairs, clip.truth)
    found = {f"revisit_{name}": mean(row[name] for row in rows) for name in ("psnr", "ssim")}
    return {**found, "pairs": rows}


def camera_metric(estimator: str, interval: int, skip_first_frame: bool = False) -> Metric:
    """Camera errors of the poses that an estimator finds.

    Args:
      estimator: `colmap`, `colmap_global`, or a folder with NAME.npz or NAME.npy of poses.
      interval, skip_first_frame: see `estimators.camera_row`.

    Raises:
      InputError: pycolmap is missing, or there is no such folder.
    """
    if estimator in ESTIMATORS:
        structure_from_motion(ESTIMATORS[estimator])  # tells at once that pycolmap is missing
    elif not Path(estimator).is_dir():
        known = ", ".join(ESTIMATORS)
        raise InputError(f"--estimator={estimator} is neither {known} nor a folder of poses")

    def estimator_of(file: VideoFile) -> Estimator:
        if estimator in ESTIMATORS:
            return structure_from_motion(ESTIMATORS[estimator], file.intrinsics)
        path = Path(estimator) / f"{file.name}.npz"
        return from_file(path if path.is_file() else path.with_suffix(".npy"))

    def camera(clip: Clip, video: np.ndarray) -> Row:
        if clip.c2w is None:
            return {}
        try:
            found = estimator_of(clip.facts["file"])
        except InputError as error:
            return {"poses": 0, "error": str(error)}
        return camera_row(found, video, clip.c2w, interval, skip_first_frame)

    return camera


METRICS: dict[str, Metric] = {"drift": changes, "quality": quality, "revisits": revisits}


def means(rows: list[Row]) -> dict[str, Any]:
    """Means over the clips of every figure that is a number, and how many clips failed."""
    figures = [row["stages"]["video"] for row in rows]
    names = {name for row in figures for name, value in row.items() if is_number(value)}
    found: dict[str, Any] = {"clips": len(rows)}
    found["failed_estimates"] = sum("error" in row for row in figures)
    for name in sorted(names):
        found[name] = mean(
            row.get(name) for row in figures if "error" not in row or name != "poses"
        )
    for name in sorted({name for row in figures for name in row if name.endswith("_by_quarter")}):
        found[name] = [mean(v) for v in zip(*(row[name] for row in figures), strict=True)]
    return found


def is_number(value: Any) -> bool:
    """Whether a figure is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def measure(
    files: list[VideoFile], metrics: Mapping[str, Metric], options: argparse.Namespace, title: str
) -> tuple[list[Row], dict[str, Any]]:
    """Measures video files, and writes what the command line asks for.

    Raises:
      InputError: a file does not fit; see `VideoFile.check`.
    """
    for file in files:
        file.check()
    store = store_of(options, _OUTPUTS, [file.path.parent for file in files[:1]])
    by_name = {file.name: file for file in files}
    rows = evaluate(by_name, lambda name: by_name[name].clip(), metrics, store, label="videos")
    table = means(rows)
    if options.json:
        write_json(options.json, {**table, "rows": rows})
    if options.report:
        print(write_report(Path(options.report), title, table, rows, store.strip))
    store.remove()
    return rows, table


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(
        prog="sanawm_jax.eval videos", description="Measures the mp4 files of a folder."
    )
    parser.add_argument("--videos", required=True, help="folder of .mp4 files")
    parser.add_argument("--truth", help="folder of the true videos, with the same names")
    parser.add_argument("--poses", help="folder of commanded poses: NAME.npz or NAME.npy")
    parser.add_argument("--estimator", help="colmap, colmap_global, or a folder of poses")
    parser.add_argument("--interval", type=int, default=4, help="frames between two poses")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--report", help="write a page with figures and clips to this folder")
    options = parser.parse_args(argv)
    try:
        for name in _OUTPUTS:
            if getattr(options, name):
                check_writable(Path(getattr(options, name)).parent)
        metrics = dict(METRICS)
        if options.estimator:
            if not options.poses:
                raise InputError("--estimator needs the commanded poses: give --poses")
            metrics["camera"] = camera_metric(options.estimator, options.interval)
        folders = (None if f is None else Path(f) for f in (options.truth, options.poses))
        files = find_videos(Path(options.videos), *folders)
        _, table = measure(files, metrics, options, f"Videos of {options.videos}")
    except InputError as error:
        fail(str(error))
    for name, value in table.items():
        print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
