"""The loop over held-out clips that all evaluations share, and their command line.

Every held-out scene gets one of the 8 single actions. A video is compared with the true renders of
all 8; it followed the camera if the commanded one is the nearest in PSNR.

Axis letters: N pixel frames, H W rows and columns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.metrics import by_quarter, gradient_ratio, psnr, ssim
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.captions import caption
from sanawm_jax.small_world.clip import HELD_OUT_SEED
from sanawm_jax.small_world.paths import SINGLE_ACTIONS, sample_intrinsics, sample_start
from sanawm_jax.small_world.render import render
from sanawm_jax.small_world.sampler import sample_scene

if TYPE_CHECKING:
    from sanawm_jax.sampling.generate import SanaWM, Video

_SHEET_CLIPS, _SHOWN_FRAMES = 8, 7


class Task(NamedTuple):
    """One held-out scene and the commanded action."""

    seed: int
    key: str
    caption: str
    intrinsics: np.ndarray  # (4,)
    truths: dict[str, np.ndarray]  # key -> (N, H, W, 3) uint8


class Metric(NamedTuple):
    """A figure of every frame, and how tables show it."""

    of: Callable[[np.ndarray, np.ndarray], np.ndarray]  # frames, truth -> (N,)
    label: str
    digits: int  # in JSON
    shown_digits: int


METRICS = {
    "psnr": Metric(psnr, "PSNR, dB", 3, 2),
    "ssim": Metric(ssim, "SSIM", 4, 4),
    "gradient_ratio": Metric(gradient_ratio, "gradient energy over the truth's", 4, 2),
}


def tasks(scenes: int, num_frames: int, size: int) -> Iterator[Task]:
    """Yields held-out scenes; their actions are the 8 ones in rotation.

    Raises:
      InputError: no scene.
    """
    if scenes < 1:
        raise InputError(f"--scenes={scenes} must be at least 1")
    for i in range(scenes):
        seed = HELD_OUT_SEED + i
        scene = sample_scene(seed)
        rng = np.random.default_rng([seed, 0xE7A1])
        start, intrinsics = sample_start(rng, scene), sample_intrinsics(rng, size, size)
        truths = {}
        for key in SINGLE_ACTIONS:
            c2w = start @ actions_to_c2w(f"{key}-{num_frames - 1}")
            truths[key] = np.asarray(render(scene, c2w, intrinsics, size, size))
        key = SINGLE_ACTIONS[i % len(SINGLE_ACTIONS)]
        yield Task(seed, key, caption(scene), intrinsics, truths)


def nearest_action(frames: np.ndarray, truths: dict[str, np.ndarray]) -> str:
    """The action whose true clip is nearest in PSNR over the whole clip; frames in [0, 1]."""
    errors = {
        key: np.square(frames - truth.astype(np.float32) / 255).mean()
        for key, truth in truths.items()
    }
    return min(errors, key=errors.__getitem__)


def sample_task(model: SanaWM, task: Task, options: argparse.Namespace) -> Video:
    """The model's video of a scene's first frame, its caption and the commanded action."""
    truth = task.truths[task.key]
    num_frames, height, width = truth.shape[:3]
    return model(
        Image.fromarray(truth[0]),
        task.caption,
        action=f"{task.key}-{num_frames - 1}",
        intrinsics=task.intrinsics,
        num_frames=num_frames,
        height=height,
        width=width,
        steps=options.steps,
        cfg_scale=options.cfg_scale,
        text_length=options.text_length,
        seed=task.seed,
        progress=False,
    )


def evaluate(
    options: argparse.Namespace,
    make: Callable[[Task, np.ndarray], dict[str, np.ndarray]],
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Runs an evaluation.

    Args:
      options: see `make_parser`.
      make: a task and its true frames (N, H, W, 3) in [0, 1] -> videos of the same shape by the
        name of the stage that made them.

    Returns:
      the figures of every stage under its name, and a strip for each of the first clips: the truth
      above the stages' videos.

    Raises:
      InputError: no scene.
    """
    found: dict[str, dict[str, list]] = {}
    strips = []
    for task in tasks(options.scenes, options.num_frames, options.size):
        truth = task.truths[task.key].astype(np.float32) / 255
        videos = make(task, truth)
        for stage, frames in videos.items():
            figures = found.setdefault(stage, {name: [] for name in ("nearest", *METRICS)})
            figures["nearest"].append((task.key, nearest_action(frames, task.truths)))
            # frame 0 is given: quality counts from frame 1
            for name, metric in METRICS.items():
                figures[name].append(by_quarter(metric.of(frames[1:], truth[1:])))
        if len(strips) < _SHEET_CLIPS:
            shown = np.linspace(0, len(truth) - 1, _SHOWN_FRAMES).astype(int)
            rows = [np.concatenate(list(clip[shown]), 1) for clip in (truth, *videos.values())]
            strips.append(np.concatenate(rows))
    table = {"clips": options.scenes, "steps": options.steps, "cfg_scale": options.cfg_scale}
    return table | {stage: summary(figures) for stage, figures in found.items()}, strips


def summary(found: dict[str, list]) -> dict[str, Any]:
    """Means over clips; drift is the first quarter's minus the last one's, positive is worse.

    Args:
      found: under `nearest` the commanded and the nearest action of every clip; under the name of
        each metric its means over the clip's quarters.
    """
    confused = [f"{key}->{nearest}" for key, nearest in found["nearest"] if key != nearest]
    out: dict[str, Any] = {
        "camera_following": 1 - len(confused) / len(found["nearest"]),
        "confused": confused,
    }
    for name, (_, _, digits, _) in METRICS.items():
        quarters = np.mean(found[name], 0)
        out[name] = round(float(quarters.mean()), digits)
        out[f"{name}_by_quarter"] = quarters.round(digits).tolist()
        out[f"{name}_drift"] = round(float(quarters[0] - quarters[-1]), digits)
    return out


def make_parser(text: str | None, sheet: str) -> argparse.ArgumentParser:
    """The arguments that all evaluations have.

    Args:
      text: documentation of the evaluation's module, whose first line is shown.
      sheet: default file of the contact sheet.
    """
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--weights", default="small_world", help="stage 1, in diffusers layout")
    parser.add_argument("--scenes", type=int, default=56, help="held-out scenes, 50 or more")
    parser.add_argument("--num_frames", type=int, default=49, help="pixel frames of a clip")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps of stage 1")
    parser.add_argument("--cfg_scale", type=float, default=1.0)
    parser.add_argument("--text_length", type=int, default=64)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--sheet", default=sheet, help="truth above the videos")
    return parser


def write_results(
    table: dict[str, Any], strips: list[np.ndarray], options: argparse.Namespace
) -> None:
    """Writes the contact sheet and, with `--json`, the figures."""
    sheet = (np.clip(np.concatenate(strips), 0, 1) * 255).astype(np.uint8)
    Image.fromarray(sheet).save(options.sheet)
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
