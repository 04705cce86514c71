"""What a visitor takes away or brings: pictures, worlds, walks, poses, keys and videos.

Nothing here uses a name or path that came from a page.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from sanawm_jax.camera.intrinsics import default_intrinsics
from sanawm_jax.camera.live import Steering
from sanawm_jax.camera.poses import keys_from_poses
from sanawm_jax.live.engine import Scene
from sanawm_jax.live.pictures import from_jpeg
from sanawm_jax.live.session import Session
from sanawm_jax.live.timeline import Node
from sanawm_jax.media.image import load_image, resize_and_center_crop
from sanawm_jax.media.overlay import OverlayPainter
from sanawm_jax.media.video import write_mp4
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.world_state import WorldState, load_state, save_state

MAX_IMAGE = 16 << 20  # bytes
MAX_PIXELS = 40_000_000
MAX_WALK = 64 << 20
_MARGIN = 1 << 20  # bytes of a world's file besides its arrays


def read_scene(data: bytes, prompt: str, height: int, width: int) -> Scene:
    """A start scene from an uploaded picture, cropped to the size of the video.

    Raises:
      InputError: it is no PNG, JPEG or WebP, or has too many pixels.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise InputError("the file is no PNG, JPEG or WebP picture") from None
    if opened.width * opened.height > MAX_PIXELS:
        raise InputError(f"the picture has more than {MAX_PIXELS // 10**6} million pixels")
    try:
        picture = load_image(opened)
    except (ValueError, OverflowError, MemoryError, Image.DecompressionBombError) as error:
        raise InputError(f"the picture is damaged ({str(error)[:80]})") from None
    crop, size, resized, _ = resize_and_center_crop(picture, height, width)
    # the field of view is that of the whole picture; the crop keeps its centre
    focal = default_intrinsics(*size)[0] * resized[0] / size[0]
    intrinsics = f"{focal:.4f},{focal:.4f},{width / 2},{height / 2}"
    name = f"upload-{hashlib.sha256(np.asarray(crop).tobytes()).hexdigest()[:12]}"
    return Scene(name, "Your picture", crop, prompt, intrinsics)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The way to the present moment, as arrays; made on the session's thread.

    Attributes:
      poses: (N, 4, 4) of all chunks.
      keys: N, held at each pose.
      is_exact: whether keys alone, at their usual speed, give the poses.
      frames: the last M JPEGs of the video.
      shown: (M, 4, 4) their poses.
      shown_keys: M.
    """

    poses: np.ndarray
    keys: list[frozenset[str]]
    is_exact: bool
    frames: list[bytes]
    shown: np.ndarray
    shown_keys: list[frozenset[str]]


def walk_of(session: Session) -> Walk:
    """Raises `InputError` before the first chunk."""
    nodes = session.timeline.way(session.node)
    if not nodes:
        raise InputError("nothing was walked yet; press a key first")
    poses = np.concatenate([node.poses for node in nodes])
    keys, is_exact = [], True
    for node in nodes:
        keys += [_keys(node)] * len(node.poses)
        steering = node.control
        is_exact &= isinstance(steering, Steering) and steering == Steering(steering.keys)
    gaps = [i for i, node in enumerate(nodes) if len(node.frames) != len(node.shown)]
    kept = nodes[gaps[-1] + 1 if gaps else 0 :]
    frames = [jpeg for node in kept for jpeg in node.frames]
    shown = np.concatenate([node.shown for node in kept]) if kept else poses[:0]
    shown_keys = [_keys(node) for node in kept for _ in node.frames]
    return Walk(poses, keys, is_exact, frames, shown, shown_keys)


def _keys(node: Node) -> frozenset[str]:
    return node.control.keys if isinstance(node.control, Steering) else frozenset()


def action_string(walk: Walk) -> str:
    """The keys as `sample.py --action` takes them; inferred from the poses if others steered too.

    The first pose is that of the given image, so the keys begin with the second one.
    """
    held = walk.keys[1:] if walk.is_exact else keys_from_poses(walk.poses)
    runs = [("".join(sorted(keys)), len(list(run))) for keys, run in itertools.groupby(held)]
    return ",".join(f"{keys or 'none'}-{count}" for keys, count in runs)


def npy(poses: np.ndarray) -> bytes:
    """The bytes of a .npy file of float32 poses, as `sample.py --camera` takes it."""
    file = io.BytesIO()
    np.save(file, poses.astype(np.float32))
    return file.getvalue()


def video(walk: Walk, file: Path, fps: float, *, overlay: bool) -> None:
    """Writes the frames that are kept as an mp4, with the keys and the path drawn on it or not.

    Raises:
      InputError: no frame is kept.
    """
    if not walk.frames:
        raise InputError("the timeline's memory is full, and no frame of this walk is kept")
    frames = map(from_jpeg, walk.frames)
    if overlay:
        height, width = from_jpeg(walk.frames[0]).shape[:2]
        painter = OverlayPainter(walk.shown, walk.shown_keys[1:], height, width)
        frames = painter.paint_all(frames)
    write_mp4(file, frames, fps)


def save_world(state: WorldState, file: Path) -> None:
    """Writes a state as `sampling.world_state` does."""
    save_state(file, state)


def largest_world(session: Session) -> int:
    """Bytes that a saved world of this model can have."""
    import jax

    leaves = jax.tree.leaves(session.world.template())
    return sum(a.size * a.dtype.itemsize for a in leaves) + _MARGIN


def load_world(session: Session, file: Path) -> None:
    """Continues a saved world; runs on the session's thread.

    Raises:
      InputError: it is of another model, or damaged.
    """
    name = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    session.adopt(load_state(file, session.world.template()), name)
