"""Encodes a folder of videos and camera paths into zip latents, which stage 1 trains on.

    python -m sanawm_jax.data.encode --videos DIR --poses DIR --weights WEIGHTS --out OUT

The command writes OUT/raw and OUT/latents, with several clips per zip. The same command continues
an interrupted run, and later adds new videos. It ends with status 0 and prints OUT as its last
line. On bad input it prints one line and ends with status 2.

OUT/reports has a report of every clip and a sheet of its frames with the camera path. Look at them
before training; `--report_only` writes them and encodes nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from sanawm_jax.camera.intrinsics import parse_intrinsics
from sanawm_jax.camera.pose_files import AXES, DIRECTIONS, FORMATS
from sanawm_jax.checkpoints.upstream_folder import open_stage1
from sanawm_jax.core.params import Params, apply
from sanawm_jax.data.clip_report import write_report
from sanawm_jax.data.fingerprints import Fingerprint, difference, fingerprint
from sanawm_jax.data.latent_cache import to_signed
from sanawm_jax.data.own_cameras import read_tracks
from sanawm_jax.data.own_videos import (
    OwnVideo,
    find_videos,
    load_clip,
    read_captions,
    read_own_video,
)
from sanawm_jax.data.zip_members import members
from sanawm_jax.data.zip_writer import RAW, ZipSample, pack_latents, write_zip_latents
from sanawm_jax.media.video import check_writable
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.command_line import (
    end_with,
    fail,
    open_standard_streams,
    show_notes,
    show_progress,
)
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.failures import INTERRUPTED
from sanawm_jax.runtime.json_file import read_json
from sanawm_jax.runtime.lock import only_run_in
from sanawm_jax.sampling.precision import matmul_precision, resolve_dtype
from sanawm_jax.vae.tiling import LONG_VIDEO, Tiling, tiled_encode

Encoder = Callable[[np.ndarray], np.ndarray]
# "time" cuts a video into windows of frames, as upstream does. Rows and columns stay whole, as when
# sampling encodes its image.
TILINGS = {
    "time": Tiling(
        use_tiling=False,
        use_framewise=True,
        tile_sample_min_num_frames=LONG_VIDEO.tile_sample_min_num_frames,
        tile_sample_stride_num_frames=LONG_VIDEO.tile_sample_stride_num_frames,
    ),
    "all": LONG_VIDEO,
    "none": Tiling(use_tiling=False, use_framewise=False),
}
_SETTINGS = "encode.json"
_REPORTS = "reports"
_SOURCES = "_sources.json"  # fingerprints of the clips of a zip, beside its raw part
_PARTS = ".encoded"  # holds the encoded clips until there are enough of them for a zip


def make_encoder(weights: str, dtype: str, tiling: str) -> tuple[Encoder, int, int]:
    """Loads the encoder of a stage-1 folder.

    Args:
      weights: see `checkpoints.upstream_folder.open_stage1`.
      dtype: see `sampling.precision.resolve_dtype`.
      tiling: a key of `TILINGS`.

    Returns:
      A function video (N, H, W, 3) uint8 -> normalised latents (F, h, w, C) float16; the number of
      pixel frames per latent frame; and the number of pixels per latent row and column.

    Raises:
      InputError: the folder or its weights do not exist.
    """
    config, graphdef, params = open_stage1(weights).load_encoder(resolve_dtype(dtype))

    @jax.jit
    def moments(params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixels = to_signed(video).astype(resolve_dtype(dtype))
        return apply(graphdef, params, pixels, method="encode")

    @jax.jit
    def normalise(params: Params, mean: jax.Array) -> jax.Array:
        return apply(graphdef, params, mean, method="normalise")

    def encode(video: np.ndarray) -> np.ndarray:
        # The video stays on the host, and only one window at a time goes to the device.
        film: Any = video[None]
        with matmul_precision(resolve_dtype(dtype)):
            tile = functools.partial(moments, params)
            mean, _ = tiled_encode(tile, film, config, TILINGS[tiling])
            return np.asarray(normalise(params, mean)[0], np.float16)

    return encode, config.temporal_ratio, config.spatial_ratio


def encode_videos(options: argparse.Namespace) -> Path:
    """Runs a parsed command line; see `make_parser`.

    Raises:
      InputError: an input is missing or does not fit, which is found before the first clip is
        encoded; or a video ends too early, and then the clips before it are kept.
    """
    videos = plan_videos(options)
    out = check_writable(options.out)
    with only_run_in(out):
        if options.report_only:
            for video in videos:
                clip = load_clip(video, options.height, options.width)
                write_report(out / _REPORTS, video, clip)
            return out / _REPORTS
        return _encode_all(videos, out, options)


def _encode_all(videos: list[OwnVideo], out: Path, options: argparse.Namespace) -> Path:
    encode, temporal, spatial = make_encoder(options.weights, options.dtype, options.tiling)
    if (options.num_frames - 1) % temporal or options.height % spatial or options.width % spatial:
        raise InputError(
            f"--num_frames {options.num_frames} must be a multiple of {temporal} and one, --height "
            f"and --width multiples of {spatial}"
        )
    _check_settings(out, options)
    done = _keys_of(out / RAW)
    for video in videos:
        if old := done.get(video.key):
            _check_unchanged(video, old, options, out)
    left = [video for video in videos if video.key not in done]
    first = 1 + max((int(f.stem.rpartition("_")[2]) for f in _zips(out / RAW)), default=-1)
    logging.info("%d clips, of which %d are encoded", len(videos), len(videos) - len(left))
    size = options.clips_per_zip
    for number, start in enumerate(range(0, len(left), size), first):
        samples, sources = [], {}
        for position, video in enumerate(left[start : start + size], start + 1):
            sample, sources[video.key] = _encode_one(video, encode, options, out)
            samples.append(sample)
            logging.info("%d of %d: %s", position, len(left), video.key)
        stem = f"clips_{number:05d}"
        (out / RAW).mkdir(exist_ok=True)
        with atomic_write(out / RAW / f"{stem}{_SOURCES}") as partial:
            partial.write_text(json.dumps(sources, indent=1, ensure_ascii=False), encoding="utf-8")
        write_zip_latents(out, stem, samples)
        shutil.rmtree(out / _PARTS)
    return out


def plan_videos(options: argparse.Namespace) -> list[OwnVideo]:
    """Reads all cameras and captions, and the headers of all videos.

    Raises:
      InputError: an input is missing or does not fit.
    """
    for name in ("num_frames", "height", "width", "frame_step", "clips_per_zip"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    if not 0 <= options.fps <= 1000:
        raise InputError(f"--fps {options.fps:g} must be from 0 to 1000")
    videos = find_videos(Path(options.videos))
    tracks = read_tracks(
        Path(options.poses),
        list(videos),
        options.pose_format,
        axes=options.pose_axes,
        direction=options.pose_direction,
    )
    captions = read_captions(Path(options.captions) if options.captions else None, videos)
    if options.intrinsics:
        parse_intrinsics(options.intrinsics, 1)  # a bad flag is no fault of the first video
    planned = [
        read_own_video(
            key,
            path,
            tracks[key],
            captions[key],
            num_frames=options.num_frames,
            frame_step=options.frame_step,
            fps=options.fps,
            intrinsics=options.intrinsics or None,
        )
        for key, path in videos.items()
    ]
    resampled = [v for v in planned if options.frame_step == 1 and len(v.numbers) <= v.numbers[-1]]
    for keys, note in (
        ([v.key for v in planned if not v.caption], "have no caption: an empty one is written"),
        (
            [v.key for v in planned if v.intrinsics is None],
            "have no intrinsics: a field of view is assumed",
        ),
        (
            [v.key for v in resampled],
            f"have another rate: the frames nearest to {options.fps:g} a second are used",
        ),
    ):
        if keys:
            logging.warning("%d videos %s; the first is %s", len(keys), note, keys[0])
    return planned


def _encode_one(
    video: OwnVideo, encode: Encoder, options: argparse.Namespace, out: Path
) -> tuple[ZipSample, Fingerprint]:
    """Returns a sample whose latents are in their own file, which is made if it does not exist.

    A file that an interrupted run made from another source is made again.
    """
    parts = out / _PARTS
    parts.mkdir(exist_ok=True)
    latents, camera, source = (parts / f"{video.key}.{end}" for end in ("npz", "npy", "json"))
    old = read_json(source) if source.is_file() else {}
    new = fingerprint(video, options.dtype, old)
    is_there = latents.is_file() and camera.is_file()
    if not is_there or difference(old, new):
        source.unlink(missing_ok=True)
        clip = load_clip(video, options.height, options.width)
        write_report(out / _REPORTS, video, clip)
        encoded = encode(clip.video)
        if not np.isfinite(encoded).all():
            raise InputError(f"{video.path} encodes to NaN or infinity; try --dtype float32")
        with atomic_write(camera) as partial:
            np.save(partial, clip.intrinsics)
        with atomic_write(latents) as partial:
            partial.write_bytes(pack_latents(encoded))
        with atomic_write(source) as partial:
            partial.write_text(json.dumps(new), encoding="utf-8")
    # The latents and intrinsics are those of the cropped frames, so the size is that of the crop:
    # a reader scales the intrinsics by this size and knows nothing of the crop.
    sample = ZipSample(
        key=video.key,
        latents=latents.read_bytes,
        c2w=video.c2w,
        intrinsics=np.load(camera),
        width=options.width,
        height=options.height,
        prompt=video.caption,
    )
    return sample, new


def _check_unchanged(
    video: OwnVideo, old: Fingerprint, options: argparse.Namespace, out: Path
) -> None:
    new = fingerprint(video, options.dtype, old)
    changed = difference(old, new)
    if changed:
        raise InputError(
            f"{out} holds clip {video.key} with {changed} than {video.path} has now; use another "
            "--out"
        )


def _check_settings(out: Path, options: argparse.Namespace) -> None:
    """Checks that all clips of one data set have the same length, size and autoencoder."""
    names = ("weights", "num_frames", "height", "width", "frame_step", "fps", "tiling")
    settings = {name: getattr(options, name) for name in names}
    file = out / _SETTINGS
    if not file.is_file():
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return
    found = read_json(file)
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged; use another --out")
    other = [name for name in names if found.get(name, settings[name]) != settings[name]]
    if other:
        raise InputError(
            f"{out} holds clips of --{other[0]} {found.get(other[0])}; use another --out"
        )


def _zips(raw: Path) -> list[Path]:
    return sorted(raw.glob("clips_[0-9]*.zip"))


def _keys_of(raw: Path) -> dict[str, Fingerprint]:
    """Returns the keys that are encoded, with fingerprints; sets of older versions have none."""
    keys: dict[str, Fingerprint] = {}
    for file in _zips(raw):
        sources = file.with_name(f"{file.stem}{_SOURCES}")
        known = read_json(sources) if sources.is_file() else {}
        try:
            with zipfile.ZipFile(file) as archive:
                keys.update({key: known.get(key, {}) for key in members(archive, ".json")})
        except Exception as error:  # of a damaged directory, zipfile raises many kinds
            raise InputError(f"{file} cannot be read ({error}); remove it") from error
    return keys


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sanawm_jax.data.encode",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--videos", required=True, help="a folder of videos or of image folders")
    parser.add_argument(
        "--poses", required=True, help="a folder with one camera per video, or a file"
    )
    parser.add_argument("--pose_format", default="auto", choices=FORMATS)
    parser.add_argument("--pose_axes", default=AXES[0], choices=AXES, help="of arrays and text")
    parser.add_argument(
        "--pose_direction", default=DIRECTIONS[0], choices=DIRECTIONS, help="of arrays and text"
    )
    parser.add_argument("--weights", required=True, help="a stage-1 folder or a hub name")
    parser.add_argument("--out", required=True, help="the folder to write raw/ and latents/ to")
    parser.add_argument("--captions", help="JSON or JSONL; default: a .txt per video")
    parser.add_argument("--intrinsics", help="fx,fy,cx,cy in video pixels, for poses without")
    parser.add_argument("--num_frames", type=int, default=961, help="8k + 1 per video")
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--frame_step", type=int, default=1, help="2: every second frame")
    parser.add_argument(
        "--fps", type=float, default=16.0, help="frames per second to use; 0: every frame"
    )
    parser.add_argument("--report_only", action="store_true", help="write OUT/reports alone")
    parser.add_argument("--clips_per_zip", type=int, default=16)
    parser.add_argument("--tiling", default="time", choices=TILINGS, help="all: least memory")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line."""
    open_standard_streams()
    options = make_parser().parse_args(arguments)
    show_notes()
    show_progress()
    logging.use_absl_handler()
    try:
        print(encode_videos(options))
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        end_with(error)


if __name__ == "__main__":
    main()
