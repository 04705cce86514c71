"""A report of each encoded clip: numbers, and a sheet of frames with the camera path drawn on them.

A wrong camera (other axes, inverted matrices, another field of view, frames in another order) is
seen at once on the sheet: the lines do not go where the pictures go.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sanawm_jax.camera.intrinsics import field_of_view
from sanawm_jax.camera.poses import relative_to_first
from sanawm_jax.data.own_videos import Clip, OwnVideo
from sanawm_jax.runtime.atomic import atomic_write

_TILES, _COLUMNS, _TILE_WIDTH, _TEXT_HEIGHT = 8, 4, 320, 44
_PLACE, _GAZE, _RIM = (0, 220, 255), (255, 196, 61), (12, 14, 20)
_NEAR = 1e-3  # points closer to the image plane than this part of the path's length are not drawn


def facts_of(video: OwnVideo, clip: Clip) -> dict[str, Any]:
    """Returns the numbers of a report as JSON values; lengths are in units of the poses."""
    height, width = clip.video.shape[1:3]
    steps = np.linalg.norm(np.diff(video.c2w[:, :3, 3].astype(np.float64), axis=0), axis=1)
    turns = np.einsum("Fji,Fjk->Fik", video.c2w[:-1, :3, :3], video.c2w[1:, :3, :3])
    angles = np.degrees(np.arccos(((np.trace(turns, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)))
    fov = field_of_view(clip.intrinsics[0], width, height)
    return {
        "video": str(video.path),
        "frames": len(video.facts.times),
        "frames_used": len(video.numbers),
        "fps": round(video.facts.fps, 3) or None,
        "fps_used": round(_used_rate(video), 3) or None,
        "size": list(video.facts.shown),
        "size_encoded": [width, height],
        "field_of_view_encoded": [round(float(v), 2) for v in fov],
        "intrinsics_encoded": [round(float(v), 3) for v in clip.intrinsics[0]],
        "intrinsics_from": video.origin,
        "path_length": round(float(steps.sum()), 4),
        "longest_step": round(float(steps.max(initial=0)), 4),
        "turned_degrees": round(float(angles.sum()), 2),
        "caption": video.caption,
    }


def write_report(folder: Path, video: OwnVideo, clip: Clip) -> dict[str, Any]:
    """Writes `<key>.json` and `<key>.png` to a folder; returns the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = facts_of(video, clip)
    with atomic_write(folder / f"{video.key}.json") as partial:
        partial.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    with atomic_write(folder / f"{video.key}.png") as partial:
        contact_sheet(video, clip, facts).save(partial)
    return facts


def contact_sheet(video: OwnVideo, clip: Clip, facts: dict[str, Any]) -> Image.Image:
    """Draws frames in equal intervals, with the camera's path from each of them to the end.

    The blue line is the path itself, a little below the camera. The yellow line is what the camera
    looks at: the centres of the later frames.
    """
    frames, height, width = clip.video.shape[:3]
    scale = _TILE_WIDTH / width
    tile_height = max(1, round(height * scale))
    chosen = np.unique(np.linspace(0, frames - 1, _TILES).round().astype(int))
    rows = -(-len(chosen) // _COLUMNS)
    size = (_COLUMNS * _TILE_WIDTH, rows * tile_height + _TEXT_HEIGHT)
    sheet = Image.new("RGB", size, _RIM)
    for place, frame in enumerate(chosen):
        tile = Image.fromarray(clip.video[frame]).resize((_TILE_WIDTH, tile_height))
        draw = ImageDraw.Draw(tile)
        for points, colour in zip(path_in_frame(video, clip, frame), (_PLACE, _GAZE), strict=True):
            _draw_line(draw, points * scale, colour)
        draw.text((6, 4), f"frame {video.numbers[frame]}", _GAZE, stroke_width=1, stroke_fill=_RIM)
        sheet.paste(tile, (place % _COLUMNS * _TILE_WIDTH, place // _COLUMNS * tile_height))
    fov = " x ".join(f"{v:.1f}" for v in facts["field_of_view_encoded"])
    lines = (
        f"{video.key}: {facts['frames_used']} of {facts['frames']} frames, {facts['fps']} fps, "
        f"{facts['size'][0]}x{facts['size'][1]} pixels",
        f"field of view {fov} degrees ({facts['intrinsics_from']}); path of {facts['path_length']} "
        f"units, turned by {facts['turned_degrees']} degrees",
    )
    # Pillow's own font has Latin letters only
    text = "\n".join(lines).encode("ascii", "replace").decode()
    ImageDraw.Draw(sheet).multiline_text((6, rows * tile_height + 4), text, (255, 255, 255))
    return sheet


def path_in_frame(video: OwnVideo, clip: Clip, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Projects the rest of the path into a frame.

    Returns:
      Positions (n, 2) of the later cameras, lowered by a twentieth of the path's length, and of
      what is in the centre of the later frames, at a great distance. Both are in pixels of the
      frame, and NaN marks points behind the camera.
    """
    poses = relative_to_first(video.c2w[frame:]).astype(np.float64)
    length = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum()
    below = poses[:, :3, 3] + [0, length / 20, 0]
    return (
        _project(below, clip.intrinsics[frame], _NEAR * max(length, 1e-9)),
        _project(poses[:, :3, 2], clip.intrinsics[frame], _NEAR),
    )


def _project(points: np.ndarray, intrinsics: np.ndarray, near: float) -> np.ndarray:
    fx, fy, cx, cy = intrinsics.astype(np.float64)
    depth = np.where(points[:, 2] > near, points[:, 2], np.nan)
    return np.stack([fx * points[:, 0] / depth + cx, fy * points[:, 1] / depth + cy], axis=1)


def _draw_line(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: tuple[int, int, int]) -> None:
    known = [tuple(p) for p in points.clip(-1e4, 1e4) if np.isfinite(p).all()]
    if len(known) > 1:
        draw.line(known, colour, width=2)
    for x, y in known[-1:]:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)


def _used_rate(video: OwnVideo) -> float:
    times = video.facts.times[video.numbers]
    length = times[-1] - times[0]
    return float((len(times) - 1) / length) if length > 0 else 0.0
