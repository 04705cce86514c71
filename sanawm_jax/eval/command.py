"""What the command lines of the small world's evaluations share: flags, weights, outputs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sanawm_jax.eval.files import write_json
from sanawm_jax.eval.report import stack, write_report
from sanawm_jax.eval.runner import Row, store_of
from sanawm_jax.eval.scenes import Task, sample, stream
from sanawm_jax.eval.world import WORLD
from sanawm_jax.media.video import check_writable
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.options import StreamOptions

if TYPE_CHECKING:
    from sanawm_jax.sampling.generate import SanaWM

_SHEET_CLIPS = 8
_OUTPUTS = ("json", "report", "sheet")


def make_parser(text: str | None, sheet: str) -> argparse.ArgumentParser:
    """The arguments that the small world's evaluations have.

    Args:
      text: documentation of the evaluation's module, whose first line is shown.
      sheet: default file of the contact sheet.
    """
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--weights", default="small_world", help="stage 1, in diffusers layout")
    parser.add_argument("--scenes", type=int, default=56, help="held-out scenes, 50 or more")
    parser.add_argument("--num_frames", type=int, default=49, help="pixel frames of a clip")
    parser.add_argument("--size", type=int, help="height and width in pixels")
    parser.add_argument("--height", type=int, default=WORLD.height, help="pixels")
    parser.add_argument("--width", type=int, default=WORLD.width, help="pixels")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps of stage 1")
    parser.add_argument("--cfg_scale", type=float, default=1.0)
    parser.add_argument("--text_length", type=int, default=64)
    parser.add_argument(
        "--streaming", action="store_true", help="chunk by chunk, with a causal model"
    )
    parser.add_argument(
        "--denoising_step_list",
        default=StreamOptions().denoising_step_list,
        help="timesteps of a chunk with --streaming",
    )
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument(
        "--report", help="write a page with figures, curves and clips to this folder"
    )
    parser.add_argument("--sheet", default=sheet, help="truth above the videos")
    return parser


def sampler_of(
    options: argparse.Namespace,
) -> tuple[SanaWM, Callable[[Task, np.ndarray], np.ndarray]]:
    """The model of a command line, and a function of a task and its first picture that samples.

    Raises:
      InputError: bad options, an output that cannot be written, or weights that cannot be used.
    """
    check(options)
    from sanawm_jax.runtime.compilation_cache import use_compilation_cache
    from sanawm_jax.sampling.generate import SanaWM

    use_compilation_cache()
    model = SanaWM.from_pretrained(options.weights, dtype="float32")
    model.check("transformer", "text_encoder", "encoder", "decoder")
    for name in ("transformer", "encoder", "decoder"):
        model.network(name)  # now, and not in several threads at once
    model.read_prompt("a room", None, options.text_length)

    def frames(task: Task, picture: np.ndarray) -> np.ndarray:
        if options.streaming:
            return stream(model, task, picture, options)
        video = sample(model, task, picture, options)
        assert video.frames is not None
        return video.frames

    return model, frames


def check(options: argparse.Namespace) -> None:
    """Refuses bad options before anything is loaded.

    Raises:
      InputError: no scene, too few frames, or an output whose folder cannot be written.
    """
    if options.size is not None:
        options.height = options.width = options.size
        options.size = None
    if options.scenes < 1:
        raise InputError(f"--scenes={options.scenes} must be at least 1")
    if options.num_frames < 9 or options.num_frames % 8 != 1:
        raise InputError(f"--num_frames={options.num_frames} must be 8k + 1, at least 9")
    for name in _OUTPUTS:
        if getattr(options, name):
            check_writable(Path(getattr(options, name)).parent)


def workers() -> int:
    """Clips at a time: one per core on a CPU, one on an accelerator."""
    import jax

    return (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1


class Run:
    """One command line's rows and outputs.

    Attributes:
      rows: of the clips, once they are measured.
      store: where they are kept until the run is complete.
    """

    def __init__(self, options: argparse.Namespace, weights: list[str]):
        self.options = options
        self.rows: list[Row] = []
        self.store = store_of(options, _OUTPUTS, weights)

    def write(self, table: dict[str, Any], title: str) -> None:
        """Writes the contact sheet, and the figures and the page if asked; then forgets the parts.

        Raises:
          InputError: a file cannot be written.
        """
        strips = [self.store.strip(row["name"]) for row in self.rows[:_SHEET_CLIPS]]
        Image.fromarray(stack([s for s in strips if s is not None])).save(self.options.sheet)
        if self.options.json:
            write_json(self.options.json, table)
        if self.options.report:
            print(
                write_report(Path(self.options.report), title, table, self.rows, self.store.strip)
            )
        self.store.remove()
