"""Held-out scenes of the small world as clips: planning, sampling, and what is measured on them.

A commanded path starts at a pose from which all 8 single actions are free. Its true video is
rendered. A video followed the camera if, of the true videos of all 8 actions, the commanded one is
the nearest in PSNR.

Axis letters: N pixel frames, H W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.camera import camera_accuracy
from sanawm_jax.eval.metrics import by_frame, by_quarter, gradient_ratio, psnr, ssim
from sanawm_jax.eval.photometric import estimate_poses
from sanawm_jax.eval.runner import Clip, Row
from sanawm_jax.eval.seen import seen_pixels
from sanawm_jax.eval.world import WORLD, World
from sanawm_jax.sampling.options import StreamOptions

if TYPE_CHECKING:
    from sanawm_jax.sampling.generate import SanaWM, Video

SINGLE_ACTIONS = "wsadijkl"
INTERVAL = 4  # every how many frames a pose is sought
_COMPARED = 8  # every how many frames the true videos of the actions are compared


@dataclass(frozen=True)
class Task:
    """One held-out scene and the commanded path.

    Attributes:
      seed: of the scene.
      action: the whole path as an action string.
      key: the single action of the last `held` frames, between whose alternatives the video
        decides.
      held: frames of this action.
      caption: what is said about the clip.
      intrinsics: (4,) in pixels.
      c2w: (N, 4, 4) poses in the scene.
      world, scene, height, width: see `eval.world`.
    """

    seed: int
    action: str
    key: str
    held: int
    caption: str
    intrinsics: np.ndarray
    c2w: np.ndarray
    height: int
    width: int
    scene: Any = field(repr=False)
    world: World = field(repr=False)

    def render(self, c2w: np.ndarray) -> np.ndarray:
        """Frames (F, H, W, 3) uint8 of poses (F, 4, 4)."""
        return self.world.frames(self.scene, c2w, self.intrinsics, self.height, self.width)

    def compared_frames(self) -> np.ndarray:
        """The frames in which the actions are compared: some of the last `held` ones."""
        last = len(self.c2w) - 1
        step = max(1, min(_COMPARED, self.held // 2))
        return np.arange(last - self.held + step, last + 1, step)

    def alternatives(self, truth: np.ndarray) -> dict[str, np.ndarray]:
        """The compared frames of the true video of every action, by its key."""
        frames = self.compared_frames()
        prefix = len(self.c2w) - 1 - self.held
        found = {}
        for key in SINGLE_ACTIONS:
            if key == self.key:
                found[key] = truth[frames]
            else:
                path = self.c2w[prefix] @ actions_to_c2w(f"{key}-{self.held}")
                found[key] = self.render(path[frames - prefix])
        return found


def plan(index: int, num_frames: int, height: int, width: int, world: World = WORLD) -> Task:
    """The task of a held-out scene; the actions are the 8 single ones in rotation."""
    key = SINGLE_ACTIONS[index % len(SINGLE_ACTIONS)]
    return plan_path(index, f"{key}-{num_frames - 1}", key, num_frames - 1, height, width, world)


def plan_path(
    index: int, action: str, key: str, held: int, height: int, width: int, world: World = WORLD
) -> Task:
    """The task of a held-out scene and of a path that ends with `held` frames of a single key."""
    seed = world.held_out_seed + index
    scene = world.scene(seed)
    rng = np.random.default_rng([seed, 0xE7A1])
    start, intrinsics = world.start(rng, scene), world.intrinsics(rng, height, width)
    c2w = start @ actions_to_c2w(action)
    caption = world.caption(scene, c2w, intrinsics)
    return Task(
        seed, action, key, held, caption, intrinsics, c2w, height, width, scene=scene, world=world
    )


def sample(model: SanaWM, task: Task, picture: np.ndarray, options: Any) -> Video:
    """The model's video of a scene's first picture (H, W, 3) uint8, its caption and the path."""
    return model(
        Image.fromarray(picture),
        task.caption,
        action=task.action,
        intrinsics=task.intrinsics,
        num_frames=len(task.c2w),
        height=task.height,
        width=task.width,
        steps=options.steps,
        cfg_scale=options.cfg_scale,
        text_length=options.text_length,
        seed=task.seed,
        progress=False,
    )


def stream(model: SanaWM, task: Task, picture: np.ndarray, options: Any) -> np.ndarray:
    """As `sample`, but chunk by chunk with a causal model: frames (N, H, W, 3)."""
    from sanawm_jax.sampling.streaming import walk_path

    world = model.open_world(
        Image.fromarray(picture),
        task.caption,
        height=task.height,
        width=task.width,
        intrinsics=task.intrinsics,
        options=StreamOptions(denoising_step_list=options.denoising_step_list),
        cfg_scale=options.cfg_scale,
        text_length=options.text_length,
        seed=task.seed,
        changes_prompt=False,
    )
    rows = np.tile(np.asarray(task.intrinsics, np.float32), (len(task.c2w), 1))
    chunks = walk_path(world, actions_to_c2w(task.action), rows)
    return np.concatenate([np.asarray(chunk.frames) for chunk in chunks])


def make_clip(task: Task, truth: np.ndarray, videos: dict[str, np.ndarray], **more: Any) -> Clip:
    """A clip whose metrics know the scene, and `more` facts."""
    facts = {"task": task, "alternatives": task.alternatives(truth), **more}
    depth = task.world.depths(task.scene, task.c2w, task.intrinsics, task.height, task.width)
    facts["seen"] = seen_pixels(depth, task.c2w, task.intrinsics)
    return Clip(videos, truth, task.c2w, facts=facts)


def nearest_action(frames: np.ndarray, truths: dict[str, np.ndarray]) -> str:
    """The action whose true frames are nearest in PSNR; all in [0, 1] or bytes."""

    def error(truth: np.ndarray) -> float:
        return by_frame(lambda a, b: np.square(a - b).mean(), frames, truth).mean()

    return min(truths, key=lambda key: error(truths[key]))


def following(clip: Clip, video: np.ndarray) -> Row:
    """The commanded action and the one that the video shows."""
    task = clip.facts["task"]
    frames = video[task.compared_frames()]
    return {"key": task.key, "nearest": nearest_action(frames, clip.facts["alternatives"])}


def quality(clip: Clip, video: np.ndarray) -> Row:
    """PSNR, SSIM and gradient-energy ratio to the truth by quarter, without the given frame 0."""
    truth = clip.truth
    assert truth is not None
    parts = {"psnr": psnr, "ssim": ssim, "gradient_ratio": gradient_ratio}
    return {
        f"{name}_by_quarter": by_quarter(of(video[1:], truth[1:])) for name, of in parts.items()
    }


def memory_and_invention(clip: Clip, video: np.ndarray) -> Row:
    """PSNR over the pixels that the first picture shows, and over the rest, by quarter."""
    truth, seen = clip.truth, clip.facts["seen"][1:]
    assert truth is not None
    return {
        f"psnr_{name}_by_quarter": by_quarter(psnr(video[1:], truth[1:], mask))
        for name, mask in (("seen", seen), ("unseen", ~seen))
    }


def followed_path(clip: Clip, video: np.ndarray) -> Row:
    """Camera errors of the poses that a search against the renderer finds, and these poses."""
    task, c2w = clip.facts["task"], clip.c2w
    assert c2w is not None
    frames = np.arange(0, len(video), INTERVAL)
    view = task.world.view(task.scene, task.intrinsics, task.height, task.width)
    found = estimate_poses(video, view, c2w[0], task.intrinsics, frames, c2w)
    errors = camera_accuracy(c2w[frames], found)
    return {**errors, "path": {"commanded": top_view(c2w[frames]), "estimated": top_view(found)}}


def top_view(c2w: np.ndarray) -> list[list[float]]:
    """The path seen from above, in the axes of the first camera: rows (right, ahead)."""
    centre = (c2w[:, :3, 3] - c2w[0, :3, 3]) @ c2w[0, :3, :3]
    return centre[:, [0, 2]].round(4).tolist()


def path_of_truth(clip: Clip, video: np.ndarray) -> Row:
    """What the pose search finds on the truth itself: its own error, whatever the video is."""
    del video
    assert clip.truth is not None
    errors = followed_path(clip, clip.truth)
    return {f"estimator_{name}": errors[name] for name in ("rot_err_deg", "trans_err", "cam_mc")}


METRICS = {
    "following": following,
    "quality": quality,
    "memory": memory_and_invention,
    "camera": followed_path,
}
