"""A minute in the small world: drift, memory and camera following at its end.

The path goes away from its start and back again and again, and ends with a single key held for the
last three seconds, so the end is compared with the true videos of all keys as a short clip is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sanawm_jax.eval.drift import against_truth, drift, saturation, windows
from sanawm_jax.eval.memory import revisit, revisit_pairs
from sanawm_jax.eval.metrics import gradient_ratio
from sanawm_jax.eval.runner import Clip, Row, evaluate
from sanawm_jax.eval.scenes import SINGLE_ACTIONS, Task, following, make_clip, plan_path
from sanawm_jax.eval.summary import mean
from sanawm_jax.runtime.errors import InputError

if TYPE_CHECKING:
    from sanawm_jax.eval.command import Run

_OPPOSITE = dict(zip("wsadikjl", "swdakilj", strict=True))
_LAST = 48  # frames of the single key at the end
_PAUSE = 8  # frames in which a motion fades
_LEG = 32  # frames of the way out; a step of 48 frames is free, and a motion fades
_TURN = 128  # frames of a turn of 77 degrees on the spot, which is always free


def add_minute_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the minute."""
    parser.add_argument("--minute", action="store_true", help="measure long clips too")
    parser.add_argument("--minute_frames", type=int, default=961, help="frames of a long clip")
    parser.add_argument("--minute_scenes", type=int, default=8, help="held-out scenes of them")


def minute_path(index: int, num_frames: int) -> tuple[str, str]:
    """The action string of a long clip, and the key of its last 48 frames.

    Every loop leaves the start by one key, waits, and comes back by the opposite key. The two keys
    of a turn come first, so that the camera sees what the first picture does not show.
    """
    rng = np.random.default_rng([index, 0x3141])
    key = SINGLE_ACTIONS[index % len(SINGLE_ACTIONS)]
    rest = num_frames - 1 - _LAST
    parts = []
    keys = "ad" + "".join(rng.permutation(list(SINGLE_ACTIONS)))
    for turn in (keys * (rest // 64 + 1))[: rest // 64 + 1]:
        leg = _TURN if turn in "ad" else _LEG
        if rest < 2 * (leg + _PAUSE):
            leg = _LEG
        if rest < 2 * (leg + _PAUSE):
            break
        parts += [(turn, leg), ("none", _PAUSE), (_OPPOSITE[turn], leg), ("none", _PAUSE)]
        rest -= 2 * (leg + _PAUSE)
    if rest:
        parts.insert(0, ("none", rest))  # at the end, the last motion would fade for longer
    parts.append((key, _LAST))
    return ",".join(f"{keys}-{frames}" for keys, frames in parts), key


def long_run(clip: Clip, video: np.ndarray) -> Row:
    """Drift, the figures against the truth, and the revisits of a long clip."""
    truth, c2w = clip.truth, clip.c2w
    assert truth is not None and c2w is not None
    last = windows(len(video), clip.fps)[-1]
    revisits = revisit(video, revisit_pairs(c2w), truth)
    return {
        "gradient_ratio_last": gradient_ratio(video[last], truth[last]).mean(),
        "saturation_ratio_last": saturation(video[last]).mean()
        / max(saturation(truth[last]).mean(), 1e-6),
        "revisit_psnr": mean(row["psnr"] for row in revisits),
        "revisit_ssim": mean(row["ssim"] for row in revisits),
        "revisit_psnr_to_truth": mean(row["psnr_to_truth"] for row in revisits),
        "revisit_psnr_of_truth": mean(row["psnr_of_truth"] for row in revisits),
        "revisits": revisits,
        "to_truth": against_truth(video, truth, clip.fps),
        "drift": drift(video, clip.fps),
    }


def minute(
    options: argparse.Namespace,
    sample_frames: Callable[[Task, np.ndarray], np.ndarray],
    run: Run,
) -> dict[str, Any]:
    """Figures of long clips.

    Returns:
      clips, frames; means over the clips of gradient_ratio_last and saturation_ratio_last (last
      10 s over the truth's), camera_following_last (share of the clips whose last three seconds are
      nearest to the commanded action), revisit_psnr and its companions; to_truth by time; and
      `rows`, the figures of every clip.

    Raises:
      InputError: no scene, or clips that are too short.
    """
    if options.minute_scenes < 1:
        raise InputError(f"--minute_scenes={options.minute_scenes} must be at least 1")
    least = _LAST + 2 * (_LEG + _PAUSE) + 1
    if options.minute_frames < least or options.minute_frames % 8 != 1:
        raise InputError(f"--minute_frames={options.minute_frames} must be 8k + 1 from {least} on")

    def make(name: str) -> Clip:
        index = int(name.removeprefix("minute_"))
        action, key = minute_path(index, options.minute_frames)
        task = plan_path(index, action, key, _LAST, options.height, options.width)
        truth = task.render(task.c2w)
        return make_clip(task, truth, {"stage1": sample_frames(task, truth[0])})

    names = [f"minute_{index}" for index in range(options.minute_scenes)]
    metrics = {"long_run": long_run, "following": following}
    rows = evaluate(names, make, metrics, run.store, label="long clips")
    run.rows += rows
    figures = [row["stages"]["stage1"] for row in rows]
    found: dict[str, Any] = {"clips": len(rows), "frames": options.minute_frames}
    for name in ("gradient_ratio_last", "saturation_ratio_last"):
        found[name] = mean(row[name] for row in figures)
    found["camera_following_last"] = mean(row["key"] == row["nearest"] for row in figures)
    for name in ("psnr", "ssim", "psnr_to_truth", "psnr_of_truth"):
        found[f"revisit_{name}"] = mean(row[f"revisit_{name}"] for row in figures)
    times = figures[0]["to_truth"]
    found["to_truth"] = {
        time: {name: mean(row["to_truth"][time][name] for row in figures) for name in times[time]}
        for time in times
    }
    return found
