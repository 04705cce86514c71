"""What the refiner changes on the small world: quality by quarter, drift, camera following.

    python -m sanawm_jax.eval.refiner --json refiner.json --sheet refiner.png
    python -m sanawm_jax.eval.refiner --weights STAGE1/export --refiner_weights BASE/export

Clips, actions and metrics are those of `eval.small_world`: held-out scenes, one of the 8 single
actions each. Every clip is sampled once by stage 1, then decoded as it is and after refinement. The
table that is printed is the model card's, in Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sanawm_jax.eval.metrics import by_quarter, detail, psnr, ssim
from sanawm_jax.eval.small_world import nearest_action, sample_task, tasks
from sanawm_jax.runtime.errors import InputError

STAGES = {"stage1": "stage 1", "refined": "refined"}  # as the table names them
_SHOWN_FRAMES = 7


class Metric(NamedTuple):
    """A figure of every frame, and how the table has it."""

    of: Callable[[np.ndarray, np.ndarray], np.ndarray]  # frames, truth -> (N,)
    label: str
    digits: int  # kept
    shown_digits: int


METRICS = {
    "psnr": Metric(psnr, "PSNR, dB", 3, 2),
    "ssim": Metric(ssim, "SSIM", 4, 4),
    "detail": Metric(detail, "detail over the truth's", 4, 2),
}


def evaluate(
    weights: str,
    refiner_weights: str,
    *,
    scenes: int = 56,
    num_frames: int = 49,
    size: int = 128,
    steps: int = 20,
    cfg_scale: float = 1.0,
    text_length: int = 64,
    sheet_clips: int = 8,
    block_frames: int = 3,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Runs the evaluation.

    Args:
      weights, refiner_weights: folders in diffusers layout, or hub names.
      scenes: held-out scenes.
      num_frames, size: of a clip, in pixel frames and pixels a side.
      steps, cfg_scale, text_length: of stage 1.
      sheet_clips: clips on the contact sheet.
      block_frames: latent frames that are refined together; 0 is the whole clip.

    Returns:
      the figures, those of either stage under its name, and a strip a clip for the contact sheet:
      truth above stage 1 above refined.

    Raises:
      InputError: no scene, or folders that are missing or do not fit each other.
    """
    import jax.numpy as jnp

    from sanawm_jax.sampling.generate import SanaWM, channels_last
    from sanawm_jax.sampling.refine import LTX2Refiner, RefineOptions

    if scenes < 1:
        raise InputError(f"--scenes={scenes} must be at least 1")
    model = SanaWM.from_pretrained(weights, dtype="float32")
    options = RefineOptions(refiner_block_size=block_frames)
    refiner = LTX2Refiner.from_pretrained(
        refiner_weights, dtype="float32", options=options, keep=True
    )
    figures: dict[str, dict[str, list]] = {
        stage: {"followed": [], **{name: [] for name in METRICS}} for stage in STAGES
    }
    strips = []
    for task in tasks(scenes, num_frames, size):
        truth = task.truths[task.key].astype(np.float32) / 255
        sampled = sample_task(model, task, steps, cfg_scale, text_length)
        assert sampled.frames is not None
        refined = refiner(sampled.latents, task.caption, progress=False)
        # with the sink, which is the given image: both videos have the same frames
        decoded = model.decode(jnp.asarray(channels_last(refined)))
        videos = dict(zip(STAGES, (sampled.frames, decoded), strict=True))
        for stage, frames in videos.items():
            found = figures[stage]
            found["followed"].append(nearest_action(frames, task.truths) == task.key)
            # frame 0 is given: quality counts from frame 1
            for name, metric in METRICS.items():
                found[name].append(by_quarter(metric.of(frames[1:], truth[1:])))
        if len(strips) < sheet_clips:
            shown = np.linspace(0, num_frames - 1, _SHOWN_FRAMES).astype(int)
            rows = [np.concatenate(list(clip[shown]), 1) for clip in (truth, *videos.values())]
            strips.append(np.concatenate(rows))
    table = {"clips": scenes, "steps": steps, "cfg_scale": cfg_scale}
    table |= {stage: summary(found) for stage, found in figures.items()}
    return table, strips


def summary(found: dict[str, list]) -> dict[str, Any]:
    """Means over clips; drift is the first quarter's minus the last one's, positive is worse."""
    out: dict[str, Any] = {"camera_following": float(np.mean(found["followed"]))}
    for name, (_, _, digits, _) in METRICS.items():
        quarters = np.mean(found[name], 0)
        out[name] = round(float(quarters.mean()), digits)
        out[f"{name}_by_quarter"] = quarters.round(digits).tolist()
        out[f"{name}_drift"] = round(float(quarters[0] - quarters[-1]), digits)
    return out


def table_lines(table: dict[str, Any]) -> list[str]:
    """The figures as the model card shows them, in Markdown."""
    head = (f"{table['clips']} clips", "quarter 1", "2", "3", "4", "mean", "drift")
    rows = [head, ("---",) * len(head)]
    for name, (_, label, _, digits) in METRICS.items():
        for stage, shown in STAGES.items():
            found = table[stage]
            values = (*found[f"{name}_by_quarter"], found[name], found[f"{name}_drift"])
            rows.append((f"{label}, {shown}", *(f"{v:.{digits}f}" for v in values)))
    for stage, shown in STAGES.items():
        followed = f"{table[stage]['camera_following']:.1%}"
        rows.append((f"camera following, {shown}", "", "", "", "", followed, ""))
    return [f"| {' | '.join(row)} |" for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", default="small_world", help="stage 1, in diffusers layout")
    parser.add_argument(
        "--refiner_weights", default="small_world_refiner", help="a refiner folder, or adapters"
    )
    parser.add_argument("--scenes", type=int, default=56, help="held-out scenes, 50 or more")
    parser.add_argument("--num_frames", type=int, default=49)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--steps", type=int, default=20, help="of stage 1")
    parser.add_argument("--cfg_scale", type=float, default=1.0)
    parser.add_argument("--text_length", type=int, default=64)
    parser.add_argument("--refiner_block_size", type=int, default=3, help="0: the whole clip")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--sheet", default="refiner_sheet.png", help="truth, stage 1, refined")
    options = parser.parse_args(argv)
    try:
        table, strips = evaluate(
            options.weights,
            options.refiner_weights,
            scenes=options.scenes,
            num_frames=options.num_frames,
            size=options.size,
            steps=options.steps,
            cfg_scale=options.cfg_scale,
            text_length=options.text_length,
            block_frames=options.refiner_block_size,
        )
    except InputError as error:
        parser.error(str(error))
    print("\n".join(table_lines(table)))
    sheet = (np.clip(np.concatenate(strips), 0, 1) * 255).astype(np.uint8)
    Image.fromarray(sheet).save(options.sheet)
    if options.json:
        text = json.dumps(table, indent=1) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
