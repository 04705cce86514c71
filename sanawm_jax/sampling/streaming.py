"""`sample.py --streaming`: sample, refine, decode and write chunk by chunk.

The device always has the work of one chunk more than the host waits for, and a thread of its own
encodes the video, so the device never waits for the host. The video is a fragmented mp4: a player
can open it while it grows, and a run that is killed leaves a file of whole chunks.

Axis letters: F latent frames, h w latent rows and columns, C latent channels, n pixel frames, H W
their rows and columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.media.video import Mp4Writer
from sanawm_jax.memory.streaming import memory_stats
from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.decode import decode_chunk
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.latents import channels_first, channels_last
from sanawm_jax.sampling.open_world import check_causal, open_world, window_of
from sanawm_jax.sampling.options import SampleOptions, StreamOptions
from sanawm_jax.sampling.precision import matmul_precision
from sanawm_jax.sampling.refine import LTX2Refiner
from sanawm_jax.sampling.request import Painter, Request
from sanawm_jax.sampling.world import World
from sanawm_jax.text.prompts import read_prompt

_GIB = 2**30
# one fragment per chunk, which is written as soon as the next one begins
FRAGMENTS = {"movflags": "+frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
# no frame waits in the encoder for a later one, and only a chunk's first frame is a key frame
NO_DELAY = {"tune": "zerolatency", "g": "100000", "sc_threshold": "0"}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one step of a stream gives; arrays that the device may still be working on."""

    latents: jax.Array  # (1, F, h, w, C), final
    frames: jax.Array | None  # (n, H, W, 3) float32 in [0, 1]
    pixels: jax.Array | None = None  # the same as bytes
    is_finite: Any = True


def make_chunk(latents: jax.Array | None, frames: jax.Array | None) -> Chunk:
    """A chunk whose bytes are queued too, before the work of the next chunk is."""
    assert latents is not None
    if frames is None:
        return Chunk(latents, None)
    pixels, is_finite = to_bytes(frames)
    pixels.copy_to_host_async()
    return Chunk(latents, frames, pixels, is_finite)


def walk_path(
    world: World, c2w: np.ndarray, intrinsics: np.ndarray, prompts: list[str] | None = None
) -> Iterator[Chunk]:
    """The chunks of a world along a whole path.

    Args:
      c2w: (N, 4, 4) poses of all pixel frames.
      intrinsics: (N, 4) in pixels.
      prompts: the prompt of each chunk; None keeps the world's.
    """
    at, steps = 0, itertools.count()
    while at < len(c2w):
        if prompts is not None and (prompt := prompts[next(steps)]) != world.prompt:
            world.set_prompt(prompt)
        end = at + world.frames_ahead
        frames = world.step(c2w[at:end], intrinsics[at:end])
        yield make_chunk(world.latents, frames)
        at = end
    if world.has_rest:
        frames = world.finish()
        yield make_chunk(world.latents, frames)


def decode_path(
    latents: np.ndarray, size: int, model: SanaWM | None, refiner: Any, dropped: int
) -> Iterator[Chunk]:
    """The chunks of given stage-1 latents: refined if there is a refiner, and decoded.

    Args:
      latents: (1, F, h, w, C) of stage 1.
      size: latent frames of a chunk; the first has one more.
      model: decodes; None leaves the latents alone.
      refiner: a `RefinerStream` or None.
      dropped: pixel frames at the start that are no part of the video.
    """
    carried = decoder = None
    cuts = [0, *range(size + 1, latents.shape[1], size), latents.shape[1]]
    pieces = [latents[:, a:b] for a, b in itertools.pairwise(cuts)]
    for i, piece in enumerate([*pieces, None]):
        if piece is not None:
            final = jnp.asarray(piece)
            if refiner:
                final, carried = refiner.step(final, carried)
        elif carried is not None and carried.waiting.shape[1]:
            final, carried = refiner.finish(carried)
        else:
            return
        frames = None
        if model is not None:
            with matmul_precision(model.dtype):
                frames, decoder = decode_chunk(
                    *model.network("decoder"), final, decoder, dtype=model.dtype
                )
            frames = frames[dropped:] if i == 0 else frames
        yield make_chunk(final, frames)


def one_ahead(chunks: Iterable[Any]) -> Iterator[Any]:
    """Yields each item after the next one was asked for, so that its work is queued already."""
    before: list[Any] = []
    for chunk in chunks:
        if before:
            yield before.pop()
        before.append(chunk)
    yield from before


@jax.jit
def to_bytes(frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Frames in [0, 1] to bytes as `media.video.to_uint8`, and whether all are finite."""
    return (jnp.clip(frames, 0, 1) * 255).astype(jnp.uint8), jnp.isfinite(frames).all()


class VideoThread:
    """Encodes chunks of frames in a thread of its own; a context manager.

    The file is opened with the first chunk. Leaving the block waits for the end of the file, and
    raises what the thread raised.
    """

    def __init__(self, path: Path, fps: float, painter: Painter | None):
        self._path, self._fps, self._painter = path, fps, painter
        self._chunks: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="video", daemon=True)

    def add(self, frames: np.ndarray) -> None:
        """Hands over a chunk (n, H, W, 3) of bytes; waits while two others wait."""
        self._chunks.put(frames)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._encode()
        except BaseException as error:
            self._error = error
            while self._chunks.get() is not None:  # so that `add` does not wait for ever
                pass

    def _encode(self) -> None:
        frames = self._chunks.get()
        if frames is None:
            return
        count = 0
        with Mp4Writer(self._path, self._fps, options=FRAGMENTS, codec=NO_DELAY) as writer:
            while frames is not None:
                for i, frame in enumerate(frames):
                    if self._painter is not None:
                        frame = self._painter.paint(frame, count)
                    writer.add(frame, is_key=i == 0)
                    count += 1
                frames = self._chunks.get()

    def __enter__(self) -> VideoThread:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._chunks.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error


class Clock:
    """When chunks were ready, for `--benchmark_json`."""

    def __init__(self, fps: float):
        self._fps, self._start = fps, time.perf_counter()
        self._marks: list[tuple[float, int]] = []
        self.opened = 0.0

    def mark_open(self) -> None:
        """The world is open: weights are loaded, the prompt and the image are read."""
        self.opened = time.perf_counter() - self._start

    def mark(self, frames: int) -> None:
        """A chunk of so many pixel frames is in host memory."""
        self._marks.append((time.perf_counter() - self._start, frames))

    def report(self) -> dict[str, Any]:
        """Seconds, gaps between chunks, and how many times faster than the video plays."""
        times = [at for at, _ in self._marks]
        gaps = np.diff(times)
        later = sum(frames for _, frames in self._marks[1:])
        stats = memory_stats() or {}
        return {
            "chunks": len(times),
            "frames": sum(frames for _, frames in self._marks),
            "open_s": round(self.opened, 3),
            "first_chunk_s": round(times[0] - self.opened, 3) if times else None,
            "gap_median_s": round(float(np.median(gaps)), 4) if len(gaps) else None,
            "gap_p95_s": round(float(np.percentile(gaps, 95)), 4) if len(gaps) else None,
            "gaps_s": [round(float(gap), 3) for gap in gaps],
            "realtime": round(later / self._fps / float(gaps.sum()), 3) if len(gaps) else None,
            "total_s": round(time.perf_counter() - self._start, 3),
            "peak_gib": round(stats.get("peak_bytes_in_use", 0) / _GIB, 2),
        }


def read_prompts(file: str, chunks: int) -> list[str]:
    """The prompt of each chunk.

    Raises:
      InputError: the file cannot be read, or does not have one line per chunk.
    """
    lines = [line.strip() for line in read_prompt(file).split("\n")]
    if len(lines) != chunks or not all(lines):
        raise InputError(
            f"--chunk_prompts={file} has {sum(map(bool, lines))} prompts, this stream has {chunks} "
            "chunks; give one prompt per line and chunk"
        )
    return lines


def write_stream(
    chunks: Iterable[Chunk], video: VideoThread | None, clock: Clock, *, keeps_frames: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Runs a stream to its end and writes its video while it runs.

    Args:
      video: encodes the frames; None writes none.
      keeps_frames: also return the frames.

    Returns:
      The latents (1, C, F, h, w), and the frames (N, H, W, 3) float32 or None.

    Raises:
      ValueError: a frame holds NaN or infinity.
    """
    latents, kept = [], []
    with contextlib.nullcontext() if video is None else video:
        for chunk in one_ahead(chunks):
            latents.append(np.asarray(chunk.latents))
            if chunk.frames is None or chunk.pixels is None:
                clock.mark(0)
                continue
            pixels = np.asarray(chunk.pixels)
            clock.mark(len(pixels))
            if not chunk.is_finite:
                raise ValueError("the decoded frames hold NaN or infinity")
            if keeps_frames:
                kept.append(np.asarray(chunk.frames))
            if video is not None:
                video.add(pixels)
    whole = channels_first(np.concatenate(latents, 1))
    return whole, np.concatenate(kept) if kept else None


def stream(
    o: SampleOptions,
    options: StreamOptions,
    model: SanaWM | None,
    refiner: LTX2Refiner | None,
    request: Request | None,
    prompt: str | None,
    given: np.ndarray | None,
    refiner_noise: np.ndarray | None,
    video: Path | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """One command line with `--streaming`, after `command.sample` has checked the rest of it.

    Args:
      o: all options.
      options: the stream's.
      model: None if latents are given and nothing is decoded.
      request: image and path, unless latents are given.
      given: stage-1 latents (1, C, F, h, w) in place of stage 1.
      refiner_noise: from `LTX2Refiner.check`.
      video: the mp4; None decodes nothing.

    Returns:
      As `write_stream`.

    Raises:
      InputError: one line on what is wrong, before anything is compiled.
    """
    clock, decodes = Clock(o.fps), video is not None
    painter = None
    if decodes and model is not None:
        check_causal(model)
    if given is not None:
        stream, dropped = None, 0
        if refiner:
            assert prompt
            stream, _ = refiner.open_stream(prompt, fps=o.fps, noise=refiner_noise, changes=False)
            dropped = refiner.options.sink_size
        chunks = decode_path(
            channels_last(given),
            options.num_frame_per_block,
            model if decodes else None,
            stream,
            dropped,
        )
    else:
        assert model and request and prompt
        frames = model.latent_shape(request)[2]
        window = window_of(options, frames)
        prompts = None
        if o.chunk_prompts:
            prompts = read_prompts(o.chunk_prompts, (frames - 1) // window.size)
            prompt = prompts[0]
        world = open_world(
            model,
            request,
            prompt,
            options=options,
            frames=frames,
            cfg_scale=o.cfg_scale,
            negative_prompt=read_prompt(o.negative_prompt) if o.negative_prompt else "",
            seed=o.seed,
            latents=o.latents,
            refiner=refiner,
            refiner_noise=refiner_noise,
            fps=o.fps,
            text_length=o.text_length,
            changes_prompt=prompts is not None,
            decode=decodes,
        )
        chunks = walk_path(world, request.c2w, request.intrinsics, prompts)
        if not o.no_action_overlay:
            dropped = refiner.options.sink_size if refiner else 0
            painter = request.painter(dropped, o.action_mapping, o.overlay)
    clock.mark_open()
    writer = None if video is None else VideoThread(video, o.fps, painter)
    found = write_stream(chunks, writer, clock, keeps_frames=bool(o.save_frames))
    if o.benchmark_json:
        with atomic_write(o.benchmark_json) as partial:
            partial.write_text(json.dumps(clock.report()) + "\n")
    return found
