"""SANA-WM-Bench: makes its videos, measures them, and writes the tables.

    python -m sanawm_jax.eval bench --data DIR --out results --method ours --weights FOLDER

A run that was killed goes on with the same command: videos and figures that exist are skipped.
Several processes share the scenes with --part 0/4 to --part 3/4, one per device.

The layout of the data and of the results is that of NVlabs/Sana's tools:
DATA/SPLIT/sanawm_export_v2/run_manifest.jsonl, DATA/SPLIT/scene_trajectories_v2.json, and
OUT/METHOD/{method_info.json, NAME/SCENE_generated.mp4, NAME/eval_poses.json, eval/NAME/*.json}.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.camera.pose_files import read_npz
from sanawm_jax.camera.poses import load_c2w
from sanawm_jax.eval.files import read_json, write_json
from sanawm_jax.eval.memory import MAX_PAIRS, PAIR_FPS, Pair, frame_at
from sanawm_jax.eval.runner import Row
from sanawm_jax.eval.summary import mean, show
from sanawm_jax.eval.videos import METRICS, VideoFile, camera_metric, measure
from sanawm_jax.media.video import to_uint8, write_mp4
from sanawm_jax.media.video_reader import video_facts
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError

SPLITS = {"simple_60s": "benchmark_v2_smooth_60s", "hard_60s": "benchmark_v2_hard_60s"}
MADE = ("weights", "refiner_weights", "num_frames", "height", "width", "fps", "steps", "cfg_scale")
MADE += ("flow_shift", "seed", "refiner_seed", "dtype")


@dataclass(frozen=True)
class Scene:
    """One scene of a split.

    Attributes:
      name, prompt, image, category: of the manifest.
      c2w: (F, 4, 4) poses; intrinsics: (F, 4) in pixels of the image.
      pairs: rows of the trajectory file's evaluation_pairs, the best ones first.
    """

    name: str
    prompt: str
    image: Path
    category: str
    c2w: np.ndarray
    intrinsics: np.ndarray | None
    pairs: list[dict[str, Any]]


def read_split(data: Path, split: str) -> list[Scene]:
    """The scenes of a split, in the order of the manifest.

    Raises:
      InputError: an unknown split, or a file that is missing or lacks a field.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    folder = data / SPLITS[split]
    manifest = folder / "sanawm_export_v2" / "run_manifest.jsonl"
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {manifest}: {error.strerror}") from error
    pairs = {}
    trajectories = read_json(folder / "scene_trajectories_v2.json")
    for row in trajectories.get("scenes", []):
        ordered = sorted(row.get("evaluation_pairs", []), key=lambda p: p.get("quality_score", 999))
        pairs[row.get("scene_id")] = ordered[:MAX_PAIRS]
    scenes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, prompt = row["id"], row["prompt"]
            image, camera = data / row["image_path"], data / row["camera_path"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest}, line {number}: not a scene ({error})") from error
        if not camera.is_file():
            raise InputError(f"{manifest}, line {number}: no poses {camera}")
        track = read_npz(camera)
        category = row.get("scene_type", "unknown")
        c2w = load_c2w(track.c2w)
        known = pairs.get(name, [])
        scenes.append(Scene(name, prompt, image, category, c2w, track.intrinsics, known))
    if not scenes:
        raise InputError(f"{manifest} has no scenes")
    return scenes


def make_videos(scenes: list[Scene], folder: Path, options: argparse.Namespace) -> None:
    """Makes the videos that are missing, with the benchmark's settings.

    Raises:
      InputError: weights that cannot be used, or a scene that is broken.
    """
    from tqdm import tqdm

    missing = [scene for scene in scenes if not video_of(folder, scene).is_file()]
    if not missing:
        return
    import jax.numpy as jnp

    from sanawm_jax.runtime.compilation_cache import use_compilation_cache
    from sanawm_jax.sampling.generate import SanaWM
    from sanawm_jax.sampling.latents import channels_last
    from sanawm_jax.sampling.options import RefineOptions
    from sanawm_jax.sampling.refine import LTX2Refiner

    use_compilation_cache()
    model = SanaWM.from_pretrained(options.weights, dtype=options.dtype, offload=options.offload)
    refiner = None
    if options.refiner_weights:
        refiner = LTX2Refiner.from_pretrained(
            options.refiner_weights,
            dtype=options.dtype,
            options=RefineOptions(refiner_seed=options.refiner_seed),
        )
    for scene in tqdm(missing, desc=folder.name, unit="video"):
        made = model(
            scene.image,
            scene.prompt,
            camera=scene.c2w[: options.num_frames],
            intrinsics=scene.intrinsics,
            num_frames=options.num_frames,
            height=options.height,
            width=options.width,
            steps=options.steps,
            cfg_scale=options.cfg_scale,
            flow_shift=options.flow_shift,
            seed=options.seed,
            text_length=options.text_length,
            decode=False,
            progress=False,
        )
        latents, dropped = made.latents, 0
        if refiner is not None:
            latents = refiner(latents, scene.prompt, fps=options.fps, progress=False)
            dropped = refiner.options.sink_size  # the given image steers, and is not part of it
        windows = model.decode_stream(jnp.asarray(channels_last(latents)))
        pictures = itertools.chain.from_iterable(map(to_uint8, windows))
        write_mp4(video_of(folder, scene), itertools.islice(pictures, dropped, None), options.fps)


def video_of(folder: Path, scene: Scene) -> Path:
    """Where the video of a scene is."""
    return folder / f"{scene.name}_generated.mp4"


def measure_split(
    scenes: list[Scene], method: Path, split: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Measures the videos of a split and writes the files that upstream's tools write.

    Raises:
      InputError: a video is missing or does not fit its scene.
    """
    is_refined = bool(read_json(method / "method_info.json").get("refiner"))
    files = []
    for scene in scenes:
        path = video_of(method / split, scene)
        if not path.is_file():
            raise InputError(f"{path} is missing; make it with the same command without --only")
        facts = video_facts(path)
        frames = len(facts.times)
        pairs = [
            Pair(
                frame_at(int(pair["frame_a"]), facts.fps or PAIR_FPS, frames),
                frame_at(int(pair["frame_b"]), facts.fps or PAIR_FPS, frames),
                float(pair.get("distance_m", np.nan)),
                float(pair.get("angle_diff_deg", np.nan)),
            )
            for pair in scene.pairs
        ]
        pairs = [pair for pair in pairs if pair.first != pair.second]
        c2w = scene.c2w[: frames + is_refined]
        files.append(VideoFile(scene.name, path, None, c2w, None, pairs, is_refined))
    metrics = dict(METRICS)
    if options.estimator:
        metrics["camera"] = camera_metric(options.estimator, options.interval)
    folder = method / "eval" / split
    named = argparse.Namespace(
        **vars(options), json=str(folder / "videos.json"), report=str(folder)
    )
    rows, table = measure(files, metrics, named, f"{method.name}, {split}")
    category = {scene.name: scene.category for scene in scenes}
    write_json(method / split / "eval_poses.json", pose_rows(rows, category, is_refined))
    write_json(folder / "revisit_consistency.json", revisit_rows(rows, category))
    return table


def pose_rows(rows: list[Row], category: dict[str, str], is_refined: bool) -> dict[str, Any]:
    """Camera errors in upstream's form; a scene whose estimate failed has its reason."""
    found = {}
    for row in rows:
        figures = row["stages"]["video"]
        if "error" in figures:
            found[row["name"]] = {"error": figures["error"], "scene_type": category[row["name"]]}
        elif "rot_err_deg" in figures:
            found[row["name"]] = {
                "RotErr": figures["rot_err_deg"],
                "RotErr_unit": "deg",
                "TransErr_rel": figures["trans_err"],
                "CamMC_rel": figures["cam_mc"],
                "scene_type": category[row["name"]],
                "n_frames": figures["poses"],
                "skip_first_frame": is_refined,
            }
    return found


def revisit_rows(rows: list[Row], category: dict[str, str]) -> dict[str, Any]:
    """Revisits in upstream's form: over all pairs, and per category over the scenes' means."""
    scenes = {r["name"]: r["stages"]["video"] for r in rows if r["stages"]["video"].get("pairs")}
    pairs = [pair for figures in scenes.values() for pair in figures["pairs"]]
    per_category = {}
    for name in sorted({category[scene] for scene in scenes}):
        inside = [figures for scene, figures in scenes.items() if category[scene] == name]
        per_category[name] = {
            "mean_psnr": mean(figures["revisit_psnr"] for figures in inside),
            "mean_ssim": mean(figures["revisit_ssim"] for figures in inside),
            "n_scenes": len(inside),
        }
    summary = {
        "overall_mean_psnr": mean(pair["psnr"] for pair in pairs),
        "overall_mean_ssim": mean(pair["ssim"] for pair in pairs),
        "n_scenes_evaluated": len(scenes),
        "n_total_pairs": len(pairs),
        "per_category": per_category,
    }
    per_scene = {
        scene: {
            "mean_psnr": figures["revisit_psnr"],
            "mean_ssim": figures["revisit_ssim"],
            "n_pairs": len(figures["pairs"]),
            "pairs": figures["pairs"],
        }
        for scene, figures in scenes.items()
    }
    return {"summary": summary, "per_scene": per_scene}


def markdown(method: str, tables: dict[str, dict[str, Any]]) -> str:
    """The table of a method, a row per split."""
    columns = {
        "clips": ("videos", 0),
        "revisit_psnr": ("revisit PSNR", 2),
        "revisit_ssim": ("SSIM", 4),
        "rot_err_deg": ("RotErr, degrees", 2),
        "trans_err": ("TransErr", 4),
        "cam_mc": ("CamMC", 4),
        "failed_estimates": ("failed estimates", 0),
        "gradient_ratio_mean": ("gradient energy to window 1", 3),
        "gradient_ratio_worst": ("worst", 3),
        "color_distance_mean": ("colour distance to window 1", 3),
    }
    lines = [f"# {method}", "", "| split | " + " | ".join(c[0] for c in columns.values()) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for split, table in tables.items():
        cells = [show(table.get(name), digits) for name, (_, digits) in columns.items()]
        lines.append(f"| {split} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """The command line; the defaults are the benchmark's settings."""
    parser = argparse.ArgumentParser(prog="sanawm_jax.eval bench", description="SANA-WM-Bench.")
    parser.add_argument("--data", required=True, help="folder of the benchmark")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--method", required=True, help="name of the folder in --out")
    parser.add_argument("--weights", help="stage 1; needed where videos are missing")
    parser.add_argument("--refiner_weights", help="stage 2")
    parser.add_argument("--splits", default=",".join(SPLITS), help="names with commas")
    parser.add_argument("--scenes", help="names with commas; by default all of the split")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th scene from I on")
    parser.add_argument("--only", choices=("make", "measure"), help="do one half")
    parser.add_argument("--estimator", help="colmap, colmap_global, or a folder of poses")
    parser.add_argument("--interval", type=int, default=4, help="frames between two poses")
    parser.add_argument("--num_frames", type=int, default=961)
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cfg_scale", type=float, default=5.0)
    parser.add_argument("--flow_shift", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--refiner_seed", type=int, default=42)
    parser.add_argument("--text_length", type=int, default=300)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--offload", default="none")
    return parser


def choose(scenes: list[Scene], options: argparse.Namespace) -> list[Scene]:
    """The scenes that the command line names, and of them the part of this process.

    Raises:
      InputError: an unknown scene, or a part that is not I/N with 0 <= I < N.
    """
    if options.scenes:
        names = options.scenes.split(",")
        unknown = sorted(set(names) - {scene.name for scene in scenes})
        if unknown:
            raise InputError(f"unknown scenes in --scenes: {', '.join(unknown)}")
        scenes = [scene for scene in scenes if scene.name in names]
    first, _, count = options.part.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise InputError(f"--part={options.part} must be I/N with I from 0 to N - 1")
    return scenes[int(first) :: int(count)]


def run(options: argparse.Namespace) -> None:
    """Makes, measures and writes.

    Raises:
      InputError: see the functions above.
    """
    method = Path(options.out) / options.method
    info = method / "method_info.json"
    splits = {name: read_split(Path(options.data), name) for name in options.splits.split(",")}
    chosen = {name: choose(scenes, options) for name, scenes in splits.items()}
    if options.only != "measure":
        if not options.weights:
            raise InputError("give --weights, or --only measure if the videos exist")
        made = {name: getattr(options, name) for name in MADE}
        made |= {"model": options.weights, "resolution": [options.height, options.width]}
        made["refiner"] = options.refiner_weights
        if info.is_file() and read_json(info) != made:
            raise InputError(
                f"{info} has other settings; use another --method or delete the folder"
            )
        write_json(info, made)
        for name, scenes in chosen.items():
            (method / name).mkdir(parents=True, exist_ok=True)
            make_videos(scenes, method / name, options)
    if options.only != "make" and options.part == "0/1":
        if not info.is_file():
            raise InputError(f"{info} is missing: it says how the videos were made")
        tables = {name: measure_split(s, method, name, options) for name, s in chosen.items()}
        write_json(method / "eval" / "summary.json", tables)
        text = markdown(options.method, tables)
        with atomic_write(method / "eval" / "summary.md") as partial:
            partial.write_text(text, encoding="utf-8")
        print(text)


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
