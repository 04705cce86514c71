"""Trains the small world's causal DiT on clips that the accelerator renders and encodes itself.

    python -m sanawm_jax.small_world.train_dit --vae VAE --out DIR --minutes 8 --workers 15

Every latent frame is a chunk. With teacher forcing, one pass over a clip trains each of its frames
to follow a clean or slightly noised history, as a stream samples it. Clips get longer during the
schedule, and new ones replace old ones between the steps.

Writes DIR/state (a compact state; the same command with --resume goes on from it), DIR/transformer,
DIR/text (tokenizer and text encoder), DIR/log.jsonl, DIR/report.json and DIR/report.jpg: each
clip's truth above what the model makes of its first frame.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sanawm_jax.checkpoints.export import export_transformer
from sanawm_jax.core.params import count
from sanawm_jax.core.sharding import logical_spec, shardings
from sanawm_jax.data.latent_cache import TextEncoder
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.compilation_cache import use_compilation_cache
from sanawm_jax.runtime.compiler_flags import use_compiler_flags
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.clip_plans import Planner
from sanawm_jax.small_world.latent_pool import ClipEncoder, Clips, latent_frames, row_shapes
from sanawm_jax.small_world.rollouts import measure_rollouts
from sanawm_jax.small_world.scenery.captions import VOCABULARY
from sanawm_jax.small_world.scenery.render import HEIGHT, WIDTH
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.small_world.timed_run import (
    Call,
    TimedRun,
    add_run_arguments,
    load_state,
    on_ranks,
    save_sheet,
)
from sanawm_jax.text.gemma import text_tower
from sanawm_jax.text.keys import load_text_encoder
from sanawm_jax.text.tokenizer import Tokenizer
from sanawm_jax.training.engine.learner import MODEL, UpdateRule
from sanawm_jax.training.engine.optimizer import learning_rate, make_optimizer
from sanawm_jax.training.engine.state import TrainState, create_state
from sanawm_jax.training.engine.step import GradientUpdate, Loss, Share
from sanawm_jax.training.objectives.flow import LOSS_WEIGHTS
from sanawm_jax.training.objectives.stage1 import Stage1Objective
from sanawm_jax.training.recipes.cached_clips import caption_encoder
from sanawm_jax.vae.keys import load_vae

TEXT_WIDTH = 128
_EARLY = 0.1  # of the schedule: clips of a length are made before steps use them


def dit_config(options: argparse.Namespace, channels: int) -> DiTConfig:
    """The published architecture with all of its branches, in the size of the options."""
    return DiTConfig(
        in_channels=channels,
        num_layers=options.layers,
        hidden_size=options.width,
        num_attention_heads=options.width // options.head,
        linear_head_dim=options.head,
        patch_size=(1, 2, 2),
        softmax_every_n=4,
        chunk_plucker_post_attn_blocks=options.layers,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=options.mlp_ratio,
    )


def objective_config(options: argparse.Namespace) -> ConfigDict:
    """What `Stage1Objective` reads; see `configs.common.stage1`."""
    return ConfigDict(
        dict(
            seed=options.seed,
            dtype="auto",
            init_weights=options.init or "",
            lora=dict(rank=0, alpha=0.0, targets=()),
            flow_shift=options.shift,
            image_prob=1.0,
            caption_dropout=options.caption_dropout,
            use_camera=True,
            remat="none",
            unroll=True,
            chunk_size=1,
            chunk_split_strategy="uniform",
            chunk_mixture=dict(same_t=1.0),
            teacher_forcing=True,
            history_noise=options.history_noise,
            cached_chunks=options.cached,
            loss_weight=options.loss_weight,
        )
    )


class Lengths:
    """Which lengths of clips are trained when: more of them the further the schedule is."""

    def __init__(self, options: argparse.Namespace, ranks: int):
        if len(options.lengths) != len(options.begin) or options.begin[0] != 0:
            raise InputError("--begin needs one number per length, the first of them 0")
        self.all = tuple(options.lengths)
        self._begin = dict(zip(options.lengths, options.begin, strict=True))
        shortest = latent_frames(self.all[0])
        # as many tokens in a batch of any length
        self.batch = {
            n: max(options.batch * shortest // latent_frames(n), 1) * ranks for n in self.all
        }

    def at(self, fraction: float) -> list[int]:
        """Lengths at this point of the schedule."""
        return [n for n in self.all if self._begin[n] <= fraction]


def text_encoder(folder: Path, length: int) -> TextEncoder:
    """Captions -> states (B, length, C) and mask; the folder is made if it is not there.

    Its tokenizer has a token for every word of a caption, and its tower is random and frozen.
    """
    if not (folder / "text_encoder" / "config.json").is_file():
        words = sorted(VOCABULARY)
        make_small_text_encoder([*words, *map(str.capitalize, words)], folder, hidden=TEXT_WIDTH)
    tower = text_tower(*load_text_encoder(folder / "text_encoder"), dtype=jnp.float32)
    return caption_encoder(tower, Tokenizer(folder / "tokenizer"), length)


class Training:
    """The network, its objectives by length, and its clips."""

    def __init__(self, timed: TimedRun, options: argparse.Namespace):
        self.timed, self.options = timed, options
        self.vae = load_vae(options.vae, dtype=np.float32)
        channels = self.vae[0].latent_channels
        self.lengths = Lengths(options, timed.mesh.size)
        self.model = dit_config(options, channels)
        self.objectives = {
            n: Stage1Objective(objective_config(options), self.model, latent_frames(n))
            for n in self.lengths.all
        }
        self.first = self.objectives[self.lengths.all[0]]
        rate = functools.partial(
            learning_rate,
            peak=options.rate,
            warmup_steps=200,
            num_steps=10**9,  # the clock alone ends a run
            final_fraction=0.02,
        )
        optimizer = make_optimizer(name="muon", betas=(0.9, 0.99), weight_decay=0.01)
        self.rule = UpdateRule(optimizer, rate, options.ema)
        folder = Path(options.text) if options.text else timed.out / "text"
        text = text_encoder(folder, options.text_length)
        null = [np.asarray(a[0]) for a in text([""])]
        self.null = jax.device_put((null[0], null[1]), timed.whole)
        size = tuple(options.size)
        encoder = ClipEncoder(
            timed.mesh,
            self.vae,
            text,
            render=options.render,
            segment=self.lengths.all[0],
            size=size,
        )
        planner = Planner(options.workers, options.first_seed, 3 * options.render, *size)
        shapes = functools.partial(
            row_shapes, size=size, channels=channels, text=(options.text_length, TEXT_WIDTH)
        )
        self.close = planner.close
        self.clips = Clips(encoder, planner, self.lengths.all, shapes, options.rows)
        self._rng = np.random.default_rng([options.seed, options.first_seed])
        self._cost = self._spent = 0.0  # seconds of one call of the encoder, and of all
        self._began = 0.0

    def start(self) -> TrainState:
        """A new state on the mesh."""
        places = shardings(self.first.abstract, self.timed.mesh)
        params = {MODEL: self.first.init(places)}
        return create_state(params, {MODEL: self.rule}, self.timed.mesh, guarded=True)

    def loss(self, num_frames: int) -> Loss:
        """Of clips of one length."""
        loss = self.objectives[num_frames].loss
        return on_ranks(loss) if self.timed.mesh.size > 1 else loss

    def update(self, num_frames: int) -> GradientUpdate:
        """A step on clips of one length; a batch is numbers of rows in each device's pool."""
        objective = self.objectives[num_frames]

        def pick(pool: Any, rows: jax.Array) -> Any:
            return jax.tree.map(lambda a: a[0][rows], pool)

        def prepare(resident: Any, batch: jax.Array, key: jax.Array) -> Any:
            spec = logical_spec("B")
            rows = jax.shard_map(pick, in_specs=(spec, spec), out_specs=spec)(
                resident["pool"], batch
            )
            return objective.prepare(rows, resident["null"], key)

        return GradientUpdate(self.rule, prepare, self.loss(num_frames))

    def resident(self, num_frames: int) -> dict[str, Any]:
        """What the steps of a length read."""
        return {"pool": self.clips.pools[num_frames].rows, "null": self.null}

    def rows(self, num_frames: int) -> np.ndarray:
        """Random rows (K, B) of the pool."""
        shape = self.options.steps_per_call, self.lengths.batch[num_frames]
        filled = max(self.clips.pools[num_frames].filled, 1)
        return self._rng.integers(0, filled, shape).astype(np.int32)

    def compile(self, state: TrainState, held_out: HeldOut) -> None:
        """Begins to compile all programs, in the order in which they are needed."""
        self.programs = {}
        for n in self.lengths.all:
            self.programs[n] = self.timed.compile(
                f"{n} frames", self.update(n), state, self.resident(n), self.rows(n)
            )
            if n == held_out.frames:
                held_out.compile(state)

    def fill(self) -> None:
        """Makes clips of the first length until its program and enough of them are there."""
        first = self.lengths.all[0]
        while (
            self.clips.seen < self.options.least
            or not self._cost
            or not self.programs[first].done()
        ):
            began = self.timed.seconds
            self.clips.add(first)
            jax.block_until_ready(self.clips.pools[first].rows)
            took = self.timed.seconds - began
            if self.clips.seen == self.options.render:
                self.timed.note(event="first clips", took=round(took, 2))  # compiles
            else:
                self._cost = min(self._cost or took, took)
            if self.clips.pools[first].added > 4 * self.clips.pools[first].capacity:
                self.programs[first].result()  # or its error
        self.timed.note(event="pool", clips=self.clips.seen, seconds_per_call=round(self._cost, 3))
        self._began = self.timed.seconds

    def renew(self, fraction: float) -> None:
        """Makes clips as long as they take no more than their share of the time."""
        eligible = self.lengths.at(fraction + _EARLY)
        while self._spent < self.options.render_share * (self.timed.seconds - self._began):
            ready = [n for n in eligible if self.clips.is_ready(n)]
            if not ready:
                break
            # the emptiest pool, and any when all are full
            filled = {n: self.clips.pools[n].filled / self.clips.pools[n].capacity for n in ready}
            least = min(filled.values())
            self.clips.add(int(self._rng.choice([n for n in ready if filled[n] == least])))
            self._spent += max(self._cost, 1e-3)

    def next_call(self, fraction: float) -> Call:
        """Some steps on one length."""
        self.renew(fraction)
        usable = [
            n
            for n in self.lengths.at(fraction)
            if self.programs[n].done() and self.clips.pools[n].filled >= self.lengths.batch[n]
        ]
        n = int(self._rng.choice(usable or self.lengths.all[:1]))
        return Call(self.programs[n].result(), self.resident(n), self.rows(n))


class HeldOut:
    """Held-out clips of the shortest length, and the loss on them with noise that never changes."""

    def __init__(self, training: Training, clips: int):
        self._training = training
        self.frames = training.lengths.all[0]
        size = training.timed.mesh.size
        self._count = -(-clips // size) * size
        self._rows: Any = None

    def compile(self, state: TrainState) -> None:
        """Begins to compile the loss."""
        training = self._training
        objective, timed = training.objectives[self.frames], training.timed

        def loss(params: Any, rows: Any, null: Any) -> dict[str, jax.Array]:
            examples = objective.prepare(rows, null, jax.random.key(0))
            value, parts = training.loss(self.frames)(params, examples)
            shares = {n: p.mean() for n, p in parts.items() if isinstance(p, Share)}
            return {"loss": value, **shares}

        rows = {
            n: jax.ShapeDtypeStruct((self._count, *a.shape[2:]), a.dtype, sharding=timed.rows)
            for n, a in training.clips.pools[self.frames].rows.items()
        }
        params = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state.model.best
        )
        self._program = timed.ahead(
            lambda: jax.jit(loss).lower(params, rows, training.null).compile()
        )

    def make(self) -> None:
        """Renders and encodes the clips."""
        training = self._training
        self.arrays, self.video = training.clips.held_out(self.frames, self._count)
        pool = training.clips.pools[self.frames].rows
        self._rows = {
            n: jax.device_put(a[: self._count].astype(pool[n].dtype), training.timed.rows)
            for n, a in self.arrays.items()
        }

    def watch(self, state: TrainState, wait: bool = False) -> dict[str, Any]:
        """Numbers for a line of the log, as soon as the program is there or with `wait`."""
        if not (wait or self._program.done()):
            return {}
        found = self._program.result()(state.model.best, self._rows, self._training.null)
        return {f"held_out_{n}": float(f"{float(v):.5g}") for n, v in found.items()}


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_run_arguments(parser, minutes=8.0)
    parser.set_defaults(rate=1e-3)
    add = parser.add_argument
    add("--vae", required=True, help="vae/ folder of the trained autoencoder")
    add("--text", help="folder with tokenizer/ and text_encoder/; without it, OUT/text is made")
    add("--lengths", type=int, nargs="+", default=(49, 97, 193, 385), help="frames of the clips")
    add("--begin", type=float, nargs="+", default=(0.0, 0.35, 0.6, 0.85), help="of each length")
    add("--batch", type=int, default=128, help="shortest clips in a batch of each device")
    add("--rows", type=int, default=24576, help="rows of the pool of the shortest clips")
    add("--least", type=int, default=1024, help="clips before the first step")
    add("--render", type=int, default=32, help="segments of the shortest length rendered at once")
    add("--render_share", type=float, default=0.25, help="of the time, for new clips")
    add("--first_seed", type=int, default=0, help="of the training clips")
    add("--held_out", type=int, default=64, help="held-out clips of the shortest length")
    add("--long", type=int, default=0, help="frames of some longer clips to measure; 0: none")
    add("--sample_steps", type=int, default=8, help="Euler steps of a frame of the rollouts")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=320)
    add("--head", type=int, default=64, help="size of a head")
    add("--mlp_ratio", type=float, default=1.5)
    add("--text_length", type=int, default=64)
    add("--shift", type=float, default=3.0, help="of the noise levels; more is noisier")
    add("--loss_weight", choices=LOSS_WEIGHTS, default="ramp")
    add("--history_noise", type=float, default=0.3)
    add("--cached", type=int, default=24, help="earlier frames that softmax layers see")
    add("--caption_dropout", type=float, default=0.1)
    add("--size", type=int, nargs=2, default=(HEIGHT, WIDTH))
    add("--init", help="folder of a run whose transformer/ this one begins with")
    add("--export", help="write transformer/ and text/ of this state/ folder, and train nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except InputError as error:
        fail(str(error))


def run(options: argparse.Namespace) -> None:
    """Makes clips, trains, measures and saves.

    Raises:
      InputError: options that do not go together, or folders that are of no use.
    """
    use_compiler_flags()
    use_compilation_cache()
    timed = TimedRun(options)
    training = Training(timed, options)
    try:
        with jax.set_mesh(timed.mesh):
            state = training.start()
            if options.export:
                best = load_state(options.export, state).model.best
                export_transformer(training.model, best, timed.out / "transformer", "bfloat16")
                return
            if options.resume:
                state = load_state(options.resume, state)
            timed.note(event="start", parameters=count(training.first.abstract))
            held_out = HeldOut(training, options.held_out)
            training.compile(state, held_out)
            training.fill()
            held_out.make()
            state = timed.train(state, training.next_call, held_out.watch)
        finish(timed, training, state, held_out)
    finally:
        training.close()


def finish(timed: TimedRun, training: Training, state: TrainState, held_out: HeldOut) -> None:
    """Saves, exports and measures: what a run must leave comes first."""
    timed.save(state)
    best = jax.device_put(state.model.best, jax.devices()[0])
    export_transformer(training.model, best, timed.out / "transformer", "bfloat16")
    options = training.options

    def measure(arrays: Any, video: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        return measure_rollouts(
            training.first.graphdef,
            best,
            training.vae,
            arrays,
            video,
            cached=options.cached,
            steps=options.sample_steps,
            shift=options.shift,
        )

    def write(report: dict[str, Any], shown: np.ndarray, name: str) -> None:
        timed.note(**report)
        (timed.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        save_sheet(timed.out / f"{name}.jpg", shown)

    report, shown = measure(held_out.arrays, held_out.video)
    report.update(
        steps=int(state.step),
        parameters=count(training.first.abstract),
        clips_seen=training.clips.seen,
        **held_out.watch(state, wait=True),
    )
    write(report, shown, "report")
    if options.long:
        with jax.set_mesh(timed.mesh):
            clips = training.clips.held_out(options.long, 1)
        write(*measure(*clips), "long")


if __name__ == "__main__":
    main()
