"""Generates the small-world set in parallel processes.

    python -m sanawm_jax.small_world.generate --data_dir D --scenes 2000 --validation 64 --workers 8

Every worker process writes parts of the set, e.g. `part_003_of_008`, one after the other. A run
that was stopped keeps its finished parts; the same command makes the others. Worker processes
share one GPU if there is one, else each renders on one CPU thread. This process never starts jax.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
from pathlib import Path

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.clip import HELD_OUT_SEED
from sanawm_jax.small_world.tfds import DATASET_NAME

# tfds keeps a part in memory until it has 1 GiB, then spills it to disk and reads it back whole;
# a clip of 49 frames of 128x128 has 2.3 MiB.
_PART_BYTES = 512 << 20


def default_parts(args: argparse.Namespace) -> int:
    """Number of parts: a multiple of the workers, each part small enough to stay in memory."""
    clips = args.scenes + args.validation
    clip_bytes = 3 * args.num_frames * args.height * args.width
    needed = max(clips * clip_bytes / _PART_BYTES, 1.0)
    workers = max(args.workers, 1)
    return max(min(workers * math.ceil(needed / workers), args.scenes), 1)


def part_fields(args: argparse.Namespace, index: int) -> dict:
    """Builder configuration of one part: an even share of the seeds, as keyword arguments."""
    train = [args.scenes * i // args.parts for i in (index, index + 1)]
    held = [args.validation * i // args.parts for i in (index, index + 1)]
    return {
        "name": f"part_{index:03d}_of_{args.parts:03d}",
        "first_seed": args.first_seed + train[0],
        "num_scenes": train[1] - train[0],
        "first_held_out": held[0],
        "num_held_out": held[1] - held[0],
        "num_frames": args.num_frames,
        "height": args.height,
        "width": args.width,
    }


def write_part(data_dir: str, fields: dict, counter=None) -> None:
    """Generate one part, unless it is finished.

    Args:
      data_dir: root of the set.
      fields: `SmallWorldConfig` arguments.
      counter: shared integer that is raised by one a clip.

    Raises:
      InputError: a finished part of that name holds other clips.
    """
    import tensorflow_datasets as tfds

    from sanawm_jax.small_world.tfds.builder import SmallWorld, SmallWorldConfig

    config = SmallWorldConfig(**fields)
    builder = SmallWorld(config=config, data_dir=data_dir)
    wanted = {split: [r.start, r.stop] for split, r in config.split_seeds().items()}
    folder = Path(builder.data_dir)
    if (folder / "dataset_info.json").exists():
        found = tfds.builder_from_directory(folder).info
        assert isinstance(found.features, tfds.features.FeaturesDict)
        wanted_shape = (config.num_frames, config.height, config.width, 3)
        same = (found.metadata or {}).get("seeds") == wanted
        if not same or found.features["video"].shape != wanted_shape:
            raise InputError(
                f"{folder} holds other clips than asked for; delete it or use another --data_dir"
            )
        if counter is not None:
            counter.value += config.num_scenes + config.num_held_out
        return
    for leftover in folder.parent.glob("incomplete.*"):  # of a run that was killed
        shutil.rmtree(leftover)
    if counter is not None:

        def count() -> None:
            counter.value += 1

        builder.on_clip = count
    builder.download_and_prepare(file_format="array_record")


def _work(data_dir: str, parts: list[dict], counter, log_path: str) -> None:
    """Body of a worker process; its messages go to a log file."""
    # Before jax starts: share the GPU's memory, and one CPU thread a process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("NPROC", "1")
    with open(log_path, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            for fields in parts:
                write_part(data_dir, fields, counter)
        except InputError as error:
            print(error, flush=True)
            sys.exit(2)


def _watch(processes: list, counters: list, total: int) -> None:
    """Print a progress line until every process has ended."""
    is_terminal = sys.stdout.isatty()
    begin, shown, first = time.monotonic(), -math.inf, None
    while alive := [p for p in processes if p.is_alive()]:
        alive[0].join(timeout=0.5)
        done, now = sum(c.value for c in counters), time.monotonic()
        if first is None and done:
            first = (now, done)
        # Finished parts and the start of jax do not count in the rate.
        rate = (done - first[1]) / max(now - first[0], 1.0) if first else 0.0
        if now - shown >= (0.5 if is_terminal else 10.0):
            end = "\r" if is_terminal else "\n"
            print(f"{done}/{total} clips, {rate:.1f} clips/s", end=end, flush=True)
            shown = now
    done = sum(c.value for c in counters)
    print(f"{done}/{total} clips after {time.monotonic() - begin:.0f} s", flush=True)


def _check(args: argparse.Namespace) -> None:
    """Raise `InputError` for arguments that cannot work, before any process starts."""
    for name in ("scenes", "workers", "parts", "height", "width"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    if args.num_frames < 2 or args.validation < 0:
        raise InputError("--num_frames must be at least 2 and --validation at least 0")
    if args.scenes < args.parts:
        raise InputError(f"--scenes {args.scenes} is less than one for each of {args.parts} parts")
    if args.first_seed < 0 or args.first_seed + args.scenes > HELD_OUT_SEED:
        raise InputError(f"training seeds must lie in 0..{HELD_OUT_SEED - 1}; lower --scenes")
    root = Path(args.data_dir).expanduser() / DATASET_NAME
    names = (re.fullmatch(r"part_\d+_of_(\d+)", p.name) for p in root.glob("part_*"))
    cuts = {int(m[1]) for m in names if m} - {args.parts}
    if cuts:
        raise InputError(
            f"{root} holds a set cut into {min(cuts)} parts; add --parts {min(cuts)} to finish it "
            "or use another --data_dir"
        )


def generate(args: argparse.Namespace) -> None:
    """Generate all parts and wait for them.

    Raises:
      InputError: a bad argument or a worker that failed, with its last message.
    """
    _check(args)
    data_dir = Path(args.data_dir).expanduser()
    logs = data_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    counters, processes, paths = [], [], []
    for worker in range(min(args.workers, args.parts)):
        parts = [part_fields(args, i) for i in range(worker, args.parts, args.workers)]
        counters.append(context.Value("q", 0, lock=False))
        paths.append(logs / f"worker_{worker:03d}.log")
        work = (str(data_dir), parts, counters[-1], str(paths[-1]))
        processes.append(context.Process(target=_work, args=work, daemon=True))
        processes[-1].start()
    _watch(processes, counters, args.scenes + args.validation)
    for process, path in zip(processes, paths, strict=True):
        if process.exitcode:
            lines = path.read_text().strip().splitlines() or ["no message"]
            raise InputError(f"a worker failed (see {path}): {lines[-1]}")


def main(argv: list[str] | None = None) -> int:
    """Entry of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate the small-world set.")
    parser.add_argument("--data_dir", required=True, help="where the set goes")
    parser.add_argument("--scenes", type=int, default=2000, help="training clips")
    parser.add_argument("--validation", type=int, default=64, help="held-out clips")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--parts", type=int, help="parts of the set; by default as memory allows")
    parser.add_argument("--first_seed", type=int, default=0, help="seed of the first scene")
    parser.add_argument("--num_frames", type=int, default=49)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args(argv)
    if args.parts is None:
        args.parts = default_parts(args)
    try:
        generate(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(Path(args.data_dir).expanduser())
    return 0


if __name__ == "__main__":
    sys.exit(main())
