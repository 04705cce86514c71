"""A stream of the released sizes with random weights: seconds per chunk, latency, realtime factor.

    python -m benchmarks.streaming --chunks 12
    python -m benchmarks.streaming --stage1_alone --chunks 40
    python -m benchmarks.streaming --tiny --chunks 3          # on a CPU

Stage 1 (4 Euler steps and the pass that writes the state), the refiner (3 steps and the pass that
writes its KV cache), the causal decoder and the mp4 encoder run as `sample.py --streaming` runs
them, 704x1280 and bfloat16. The weights are drawn on the device and the text is random, so nothing
is read from disk; `first_chunk_s` therefore begins when the weights are loaded and the text is
encoded. The first stream compiles; the second one finds its programs and is the one that is
reported. Then each stage runs alone and waits for its result, which gives `seconds by stage`; in a
stream the stages follow each other without waiting.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

FPS, TEXT, REFINER_TEXT = 16.0, 300, 1024


class RandomModel:
    """What a `World` reads of `SanaWM`, with random weights."""

    def __init__(self, sizes: Any, dtype: Any, text: int):
        from sanawm_jax.dit.model import DiT
        from sanawm_jax.dit.numerics import PRESETS
        from sanawm_jax.vae.model import VideoDecoder

        self.dtype, self._text = dtype, text
        self.vae_config = dataclasses.replace(sizes.vae, decoder_causal=True)
        self.dit_config = dataclasses.replace(sizes.dit, numerics=PRESETS["streaming"])
        self._networks = {
            "transformer": common.random_params(DiT, self.dit_config, dtype),
            "decoder": common.random_params(VideoDecoder, self.vae_config, dtype),
        }

    def network(self, name: str) -> Any:
        return self._networks[name]

    def read_prompt(self, prompt: str, negative: str | None, length: int) -> Any:
        import jax
        import jax.numpy as jnp

        shape = (1, self._text, self.dit_config.caption_channels)
        text = jax.random.normal(jax.random.key(1), shape, self.dtype)
        return text, jnp.ones(shape[:2], jnp.int32)


def random_refiner(sizes: Any, dtype: Any, length: int) -> Any:
    """A `RefinerStream` of random weights."""
    import jax

    from sanawm_jax.refiner.model import Refiner
    from sanawm_jax.refiner.sampler import SIGMAS, RefinerText, read_text
    from sanawm_jax.refiner.state import RefinerStream

    config = sizes.refiner
    graphdef, params = common.random_params(Refiner, config, dtype, draw=common.random_layers)
    shape = (1, length, config.text_width)
    text = RefinerText(jax.random.normal(jax.random.key(2), shape, dtype))
    params, text = read_text(graphdef, params, text, dtype=dtype)
    return RefinerStream(graphdef, params, config, text, SIGMAS, FPS, 1, 3, 11, 42, dtype)


def open_one(given: argparse.Namespace, model: Any, refiner: Any, size: tuple[int, int]) -> Any:
    """A new world at a random first latent."""
    import jax

    from sanawm_jax.camera.mapping import get_mapping
    from sanawm_jax.sampling.open_world import window_of
    from sanawm_jax.sampling.options import StreamOptions
    from sanawm_jax.sampling.world import Settings, World

    options, vae = StreamOptions(), model.vae_config
    grid = [length // vae.spatial_ratio for length in size]
    latent = jax.random.normal(jax.random.key(3), (1, 1, *grid, vae.latent_channels))
    settings = Settings(
        window_of(options, None),
        options.sigmas,
        *size,
        np.array([size[1], size[1], size[1] / 2, size[0] / 2]),
        get_mapping("sana"),
        decode=not given.stage1_alone,
    )
    return World(model, latent, "a room", settings, refiner)


def run(given: argparse.Namespace, world: Any, video: Path) -> dict[str, Any]:
    """One stream along a straight path; returns the report of its clock."""
    from sanawm_jax.sampling.streaming import Clock, VideoThread, walk_path, write_stream

    frames = 24 * given.chunks + 1
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = 0.025 * np.arange(frames)
    rows = np.tile(world._intrinsics, (frames, 1))
    clock = Clock(FPS)
    writer = None if given.stage1_alone else VideoThread(video, FPS, None)
    write_stream(walk_path(world, c2w, rows), writer, clock, keeps_frames=False)
    return clock.report()


def by_stage(model: Any, refiner: Any, world: Any, repeats: int) -> dict[str, Any]:
    """Median seconds of each stage alone, for a chunk of a stream whose caches are full."""
    import jax

    state = world.state.carried
    size = world.window.size
    noise = world._noise(size)
    poses, _ = world._poses("w")
    conditions = world._conditions(poses, np.tile(world._intrinsics, (len(poses), 1)))
    seconds: dict[str, list[float]] = {"stage 1": [], "refiner": [], "decoder": []}

    def timed(name: str, call: Any, *inputs: Any) -> Any:
        start = time.perf_counter()
        found = jax.block_until_ready(call(*inputs))
        seconds[name].append(time.perf_counter() - start)
        return found

    for _ in range(1 + repeats):
        copy = jax.block_until_ready(jax.tree.map(lambda a: a.copy(), state))
        latents, _ = timed("stage 1", world._denoise, copy.dit, noise, None, conditions)
        assert latents.shape[1] == size
        if refiner is not None:
            latents, _ = timed("refiner", refiner.step, latents, copy.refiner)
        if copy.decoder is not None:
            timed("decoder", world._decode, latents, copy.decoder)
    return {name: round(float(np.median(s[1:])), 4) for name, s in seconds.items() if s}


def main() -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming")
    parser.add_argument("--chunks", type=int, default=12, help="24 frames each")
    parser.add_argument("--stage1_alone", action="store_true", help="neither refiner nor decoder")
    parser.add_argument("--no_refiner", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="calls for the median of a stage")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels")
    given = parser.parse_args()

    import jax

    from sanawm_jax.checkpoints.sizes import RELEASED, TINY
    from sanawm_jax.runtime.compilation_cache import use_compilation_cache
    from sanawm_jax.runtime.compiler_flags import use_compiler_flags

    use_compiler_flags()
    use_compilation_cache()
    sizes, size = (TINY, (64, 64)) if given.tiny else (RELEASED, (704, 1280))
    text, refiner_text = (12, 8) if given.tiny else (TEXT, REFINER_TEXT)
    dtype = common.jax_dtype(given.tiny)
    model = RandomModel(sizes, dtype, text)
    has_refiner = not (given.no_refiner or given.stage1_alone)
    refiner = random_refiner(sizes, dtype, refiner_text) if has_refiner else None
    device = jax.devices()[0].device_kind
    spent: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: spent.update({name.rpartition("/")[2]: seconds})
    )
    with tempfile.TemporaryDirectory() as folder:
        for what in ("stream that compiles", "stream"):
            world = open_one(given, model, refiner, size)
            found = run(given, world, Path(folder) / "a.mp4")
            print(json.dumps({"what": what, **found, "device": device}), flush=True)
            parts = {name: round(s, 1) for name, s in spent.most_common(8) if s > 0.1}
            print(json.dumps({"what": "start-up", **parts}), flush=True)
            spent.clear()
        stages = by_stage(model, refiner, world, given.repeats)
        print(json.dumps({"what": "seconds by stage", **stages}), flush=True)
        if given.profile:
            profile(given, open_one(given, model, refiner, size), Path(folder))


def profile(given: argparse.Namespace, world: Any, folder: Path) -> None:
    """Prints the kernels of a few chunks, the longest first."""
    import jax

    from benchmarks.profile_step import kernels

    given.chunks = 4
    with jax.profiler.trace(str(folder)):
        run(given, world, folder / "b.mp4")
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for _, kernel, nanoseconds in kernels(folder):
        entry = found[re.sub(r"[._\d]+$", "", kernel)[:60]]
        entry[0] += nanoseconds * 1e-6 / given.chunks
        entry[1] += 1 / given.chunks
    busy = sum(ms for ms, _ in found.values())
    count = sum(runs for _, runs in found.values())
    line = {"what": "profile of a chunk", "busy_ms": round(busy, 1), "kernels": round(count)}
    print(json.dumps(line), flush=True)
    for name, (ms, runs) in sorted(found.items(), key=lambda item: -item[1][0])[:40]:
        print(json.dumps({"kernel": name, "ms": round(ms, 2), "runs": round(runs)}), flush=True)


if __name__ == "__main__":
    main()
