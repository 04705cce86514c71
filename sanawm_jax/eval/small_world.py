"""How well a small-world model follows the camera and what its video is worth.

    python -m sanawm_jax.eval.small_world --scenes 56 --json table.json --sheet sheet.png

Every held-out scene gets one of the 8 single actions. The generated clip is compared with the
ground-truth renders of all 8; the camera was followed if the commanded one is the nearest in PSNR.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.metrics import by_quarter, psnr, ssim
from sanawm_jax.small_world.captions import caption
from sanawm_jax.small_world.clip import HELD_OUT_SEED
from sanawm_jax.small_world.paths import SINGLE_ACTIONS, sample_intrinsics, sample_start
from sanawm_jax.small_world.render import render
from sanawm_jax.small_world.sampler import sample_scene

if TYPE_CHECKING:
    from sanawm_jax.sampling.generate import SanaWM, Video


class Task(NamedTuple):
    """One held-out scene and what the camera is told to do; N pixel frames."""

    seed: int
    key: str
    caption: str
    intrinsics: np.ndarray  # (4,)
    truths: dict[str, np.ndarray]  # key -> (N, H, W, 3) uint8


def tasks(scenes: int, num_frames: int, size: int) -> Iterator[Task]:
    """Yields held-out scenes; the commanded action runs through the 8 in turn."""
    for i in range(scenes):
        seed = HELD_OUT_SEED + i
        scene = sample_scene(seed)
        rng = np.random.default_rng([seed, 0xE7A1])
        start, intrinsics = sample_start(rng, scene), sample_intrinsics(rng, size, size)
        truths = {
            key: np.asarray(
                render(
                    scene,
                    start @ actions_to_c2w(f"{key}-{num_frames - 1}"),
                    intrinsics,
                    size,
                    size,
                )
            )
            for key in SINGLE_ACTIONS
        }
        key = SINGLE_ACTIONS[i % len(SINGLE_ACTIONS)]
        yield Task(seed, key, caption(scene), intrinsics, truths)


def nearest_action(frames: np.ndarray, truths: dict[str, np.ndarray]) -> str:
    """The action whose true clip is nearest in PSNR over the whole clip; frames in [0, 1]."""
    errors = {
        key: np.square(frames - truth.astype(np.float32) / 255).mean()
        for key, truth in truths.items()
    }
    return min(errors, key=errors.__getitem__)


def sample_task(model: SanaWM, task: Task, steps: int, cfg_scale: float, text_length: int) -> Video:
    """What the model makes of a scene's first frame, its caption and the commanded action."""
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
        steps=steps,
        cfg_scale=cfg_scale,
        text_length=text_length,
        seed=task.seed,
        progress=False,
    )


def evaluate(
    weights: str, scenes: int, steps: int, cfg_scale: float, text_length: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Runs the evaluation.

    Returns:
      the figures, and pairs of strips (truth above generated) for a contact sheet.
    """
    import jax.numpy as jnp

    from sanawm_jax.sampling.generate import SanaWM

    model = SanaWM.from_pretrained(weights, dtype="float32")
    num_frames, size = 49, 128
    followed, confused, strips = [], [], []
    quality: dict[str, list[np.ndarray]] = {"psnr": [], "ssim": []}
    vae_psnr = []
    for task in tasks(scenes, num_frames, size):
        truth = task.truths[task.key].astype(np.float32) / 255
        video = sample_task(model, task, steps, cfg_scale, text_length)
        assert video.frames is not None
        answer = nearest_action(video.frames, task.truths)
        followed.append(answer == task.key)
        if answer != task.key:
            confused.append(f"{task.key}->{answer}")
        # frame 0 is given: quality counts from frame 1
        quality["psnr"].append(by_quarter(psnr(video.frames[1:], truth[1:])))
        quality["ssim"].append(by_quarter(ssim(video.frames[1:], truth[1:])))
        latents = model.encode(jnp.asarray(truth * 2 - 1)[None])
        vae_psnr.append(psnr(model.decode(latents), truth).mean())
        if len(strips) < 8:
            shown = np.linspace(0, num_frames - 1, 7).astype(int)
            rows = [np.concatenate(list(clip[shown]), 1) for clip in (truth, video.frames)]
            strips.append(np.concatenate(rows))
    table = {
        "clips": scenes,
        "camera_following": float(np.mean(followed)),
        "confused": confused,
        "psnr_by_quarter": np.mean(quality["psnr"], 0).round(3).tolist(),
        "ssim_by_quarter": np.mean(quality["ssim"], 0).round(4).tolist(),
        "vae_psnr": float(np.mean(vae_psnr)),
        "steps": steps,
        "cfg_scale": cfg_scale,
    }
    return table, strips


def print_table(table: dict[str, Any]) -> None:
    """The figures as the model card shows them."""
    print(f"clips                {table['clips']}")
    print(f"camera following     {table['camera_following']:.1%}")
    if table["confused"]:
        print(f"  confused           {' '.join(table['confused'])}")
    print(f"VAE reconstruction   {table['vae_psnr']:.2f} dB")
    print("quarter              " + "".join(f"{q:>9}" for q in range(1, 5)))
    print("PSNR to truth, dB    " + "".join(f"{v:9.2f}" for v in table["psnr_by_quarter"]))
    print("SSIM to truth        " + "".join(f"{v:9.4f}" for v in table["ssim_by_quarter"]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", default="small_world", help="a folder in diffusers layout")
    parser.add_argument("--scenes", type=int, default=56, help="held-out scenes, 50 or more")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg_scale", type=float, default=1.0)
    parser.add_argument("--text_length", type=int, default=64)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--sheet", default="small_world_sheet.png", help="truth above generated")
    options = parser.parse_args(argv)
    table, strips = evaluate(
        options.weights,
        options.scenes,
        options.steps,
        options.cfg_scale,
        options.text_length,
    )
    print_table(table)
    sheet = (np.clip(np.concatenate(strips), 0, 1) * 255).astype(np.uint8)
    Image.fromarray(sheet).save(options.sheet)
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
