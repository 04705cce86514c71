"""Trains the small world's video autoencoder on clips that the accelerator renders itself.

    python -m sanawm_jax.small_world.train_vae --out DIR --minutes 8 --workers 15

Writes DIR/state (a compact state; the same command with --resume goes on from it), DIR/vae
(diffusers layout), DIR/log.jsonl, and DIR/report.json with the figures on held-out clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sanawm_jax.checkpoints.export import export_vae
from sanawm_jax.core.params import Params, apply, build, count, init
from sanawm_jax.core.sharding import logical_spec, place, shardings
from sanawm_jax.data.latent_cache import to_signed
from sanawm_jax.eval.metrics import gradient_energy
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.compilation_cache import use_compilation_cache
from sanawm_jax.runtime.compiler_flags import use_compiler_flags
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world.scenery.clip import HELD_OUT_SEED
from sanawm_jax.small_world.scenery.pool import render_pool
from sanawm_jax.small_world.scenery.render import HEIGHT, WIDTH
from sanawm_jax.small_world.timed_run import (
    Call,
    TimedRun,
    add_run_arguments,
    load_state,
    save_sheet,
)
from sanawm_jax.training.engine.learner import MODEL, UpdateRule
from sanawm_jax.training.engine.optimizer import learning_rate, make_optimizer
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.engine.state import TrainState, create_state
from sanawm_jax.training.engine.step import GradientUpdate, Update
from sanawm_jax.training.objectives.vae_loss import VAELossWeights, vae_loss
from sanawm_jax.training.recipes.clips import crop_clips
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.keys import load_vae
from sanawm_jax.vae.latents import sample_posterior
from sanawm_jax.vae.model import VideoVAE


def vae_config(channels: int = 64, width: int = 96) -> VAEConfig:
    """160x96 video of 8k+1 frames <-> (k+1, 12, 20, channels) latents, with a causal decoder.

    Only the decoder, of this width, runs in a live world; the encoder reads one picture.
    """
    return VAEConfig(
        latent_channels=channels,
        block_out_channels=(2 * channels,) * 3,
        down_block_types=("LTX2VideoDownBlock3D",) * 3,
        layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True,) * 3,
        downsample_type=("temporal",) * 3,
        decoder_block_out_channels=(width,) * 3,
        decoder_layers_per_block=(1, 1, 1, 3),
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4,
        upsample_type=("temporal",) * 3,
        upsample_residual=(True,) * 3,
        upsample_factor=(1,) * 3,
        patch_size=8,
        decoder_causal=True,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    )


def unpack(packed: jax.Array) -> jax.Array:
    """(..., H, W * 3 / 4) uint32 -> (..., H, W, 3) float32 in [-1, 1]."""
    pixels = jax.lax.bitcast_convert_type(packed, jnp.uint8)
    pixels = pixels.reshape(*packed.shape[:-1], -1, 3)
    return to_signed(pixels)


def sharpness_loss(decoded: jax.Array, video: jax.Array, window: int = 16) -> jax.Array:
    """How far the gradient energy of windows is from the truth's, () float32.

    A loss of single pixels alone prefers a blur where it is unsure, and loses a fifth of the
    gradient energy at 37 dB. This one compares the root of the energy that a window of
    `window` x `window` pixels has, not where in it the gradients are.
    """

    def strength(x: jax.Array) -> jax.Array:
        height, width = x.shape[2] // window * window, x.shape[3] // window * window
        across = jnp.pad(jnp.square(jnp.diff(x, axis=3)), ((0, 0),) * 3 + ((0, 1), (0, 0)))
        up = jnp.pad(jnp.square(jnp.diff(x, axis=2)), ((0, 0),) * 2 + ((0, 1), (0, 0), (0, 0)))
        energy = (across + up).mean(-1)[:, :, :height, :width]
        shape = (*energy.shape[:2], height // window, window, width // window, window)
        return jnp.sqrt(energy.reshape(shape).mean((3, 5)) + 1e-6)

    return jnp.abs(strength(decoded) - strength(video)).mean()


class Trainer:
    """One autoencoder's objective, and its measures."""

    def __init__(self, config: VAEConfig, options: argparse.Namespace):
        self.config, self.options = config, options
        self.graphdef, self.abstract = build(VideoVAE, config)
        self.dtype = compute_dtype("auto")
        rate = functools.partial(
            learning_rate,
            peak=options.rate,
            warmup_steps=200,
            num_steps=10**9,  # the clock alone ends a run
            final_fraction=0.02,
        )
        optimizer = make_optimizer(name="muon", betas=(0.9, 0.99))
        self.rule = UpdateRule(optimizer, rate, options.ema)
        self.weights = VAELossWeights(
            charbonnier=0.5, squared=2.0, edges=options.edges, kl=options.kl, scales=1
        )

    def start(self, mesh: Mesh) -> TrainState:
        """A new state, or one that begins with the weights of `--init`."""
        places = shardings(self.abstract, mesh)
        if self.options.init:
            params = place(load_vae(self.options.init, dtype=np.float32)[1], places)
        else:
            key = jax.random.key(self.options.seed)
            params = init(VideoVAE, self.config, key, shardings=places)
        return create_state({MODEL: params}, {MODEL: self.rule}, mesh, guarded=True)

    def encode(self, params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance, float32."""
        moments = apply(self.graphdef, params, video.astype(self.dtype), method="encode")
        return moments[0].astype(jnp.float32), moments[1].astype(jnp.float32)

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Video of latents as the encoder gives them, float32."""
        video = apply(self.graphdef, params, latents.astype(self.dtype), method="decode")
        return video.astype(jnp.float32)

    def update(self, frames: int, sharpness: float) -> Update:
        """A training step on examples of so many frames, with this weight of `sharpness_loss`."""

        def crop(pool: jax.Array, rows: jax.Array) -> jax.Array:
            return to_signed(crop_clips(pool[0], rows[:, 0], rows[:, 1], frames))

        def prepare(resident: jax.Array, batch: jax.Array, key: jax.Array) -> Any:
            rows = logical_spec("B")  # every rank crops clips of its own part of the pool
            video = jax.shard_map(crop, in_specs=(rows, rows), out_specs=rows)(resident, batch)
            latent = jax.eval_shape(self.encode, self.abstract, video)[0].shape
            return video, jax.random.normal(key, latent)

        def loss(params: Params, examples: Any) -> tuple[jax.Array, dict[str, Any]]:
            video, noise = examples
            mean, logvar = self.encode(params, video)
            decoded = self.decode(params, sample_posterior(mean, logvar, noise))
            loss, terms = vae_loss(decoded, video, mean, logvar, self.weights)
            sharp = sharpness_loss(decoded, video, min(16, *video.shape[2:4]))
            return loss + sharpness * sharp, {"sharpness": sharp, **terms}

        return GradientUpdate(self.rule, prepare, loss)

    def statistics(self, params: Params, pool: jax.Array, clips: int = 512) -> Params:
        """`params` with the latents' mean and deviation, (C,), of clips (n, F, H, W * 3 / 4)."""
        encode = jax.jit(lambda p, v: self.encode(p, unpack(v))[0])
        frames = (pool.shape[1] - 1) // 8 * 8 + 1
        size, count = min(16, len(pool)), min(clips, len(pool))
        parts = [
            np.asarray(encode(params, pool[i : i + size, :frames]), np.float64)
            for i in range(0, count - size + 1, size)
        ]
        latents = np.concatenate(parts).reshape(-1, self.config.latent_channels)
        mean, std = latents.mean(0), latents.std(0)
        return {
            **params,
            "latents_mean": jnp.asarray(mean, jnp.float32),
            "latents_std": jnp.asarray(np.maximum(std, 1e-4), jnp.float32),
        }

    def measure(self, params: Params, held_out: np.ndarray) -> dict[str, Any]:
        """PSNR in dB and gradient-energy ratio on held-out clips, and the latents' spread."""

        @jax.jit
        def figures(params, packed):
            truth = unpack(packed)
            mean, _ = self.encode(params, truth)
            made = jnp.clip(self.decode(params, mean), -1.0, 1.0)
            made = jnp.round((made + 1.0) * 127.5) / 127.5 - 1.0
            error = jnp.square((made - truth) / 2.0).mean((-3, -2, -1))
            ratio = gradient_energy(made) / jnp.maximum(gradient_energy(truth), 1e-9)
            return -10.0 * jnp.log10(error + 1e-10), ratio, made

        psnr, ratio, shown = [], [], []
        for start in range(0, len(held_out), 8):
            part = held_out[start : start + 8]
            values = figures(params, part)
            psnr.append(np.asarray(values[0]))
            ratio.append(np.asarray(values[1]))
            if start < 16:
                both = np.stack([np.asarray(unpack(jnp.asarray(part))), np.asarray(values[2])], 1)
                shown.append(both[:, :, :: max(both.shape[2] // 4, 1)][:, :, :5])
        psnr, ratio = np.concatenate(psnr), np.concatenate(ratio)
        return {
            "clips": len(psnr),
            "psnr": float(psnr.mean()),
            "psnr_first_frame": float(psnr[:, 0].mean()),
            "psnr_worst_clip": float(psnr.mean(1).min()),
            "gradient_ratio": float(ratio.mean()),
            "psnr_by_quarter": [float(p.mean()) for p in np.array_split(psnr, 4, 1)],
            "gradient_ratio_by_quarter": [float(r.mean()) for r in np.array_split(ratio, 4, 1)],
            "shown": np.concatenate(shown),
        }


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_run_arguments(parser, minutes=8.0)
    parser.add_argument(
        "--clips", type=int, default=3584, help="training scenes of each device; 49 frames: 8 GB"
    )
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--pool_frames", type=int, default=49, help="frames of each clip")
    parser.add_argument("--held_out", type=int, default=64, help="held-out clips")
    parser.add_argument("--render", type=int, default=32, help="clips rendered at once")
    parser.add_argument("--batch", type=int, default=32, help="examples of each device")
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=(17, 41),
        help="of each example, in equal parts of the schedule; a decoder that saw only 17 frames "
        "fails beyond them",
    )
    parser.add_argument(
        "--sharpness", type=float, nargs="+", default=(0.0, 0.5), help="of `sharpness_loss`"
    )
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--edges", type=float, default=0.35)
    parser.add_argument("--kl", type=float, default=1e-4)
    parser.add_argument("--size", type=int, nargs=2, default=(HEIGHT, WIDTH))
    parser.add_argument("--init", help="vae/ folder whose weights the run begins with")
    parser.add_argument("--export", help="write vae/ of this state/ folder, and train nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except InputError as error:
        fail(str(error))


def run(options: argparse.Namespace) -> None:
    """Renders, trains, measures and saves.

    Raises:
      InputError: options that do not go together.
    """
    if len(options.frames) != len(options.sharpness):
        raise InputError("--frames and --sharpness need the same number of values")
    if max(options.frames) > options.pool_frames:
        raise InputError(f"--frames={max(options.frames)} is above --pool_frames")
    use_compiler_flags()
    use_compilation_cache()
    timed = TimedRun(options)
    mesh, (height, width) = timed.mesh, options.size
    trainer = Trainer(vae_config(options.channels, options.width), options)
    with jax.set_mesh(mesh):
        state = trainer.start(mesh)
        if options.export:
            average = load_state(options.export, state).model.best
            export_vae(trainer.config, average, timed.out / "vae", "bfloat16")
            return
        if options.resume:
            state = load_state(options.resume, state)
        packed = (mesh.size, options.clips, options.pool_frames, height, width * 3 // 4)
        shape = jax.ShapeDtypeStruct(packed, jnp.uint32, sharding=timed.rows)
        rng = np.random.default_rng([options.seed, int(state.step)])

        def rows(frames: int) -> np.ndarray:
            size = (options.steps_per_call, options.batch * mesh.size)
            starts = rng.integers(0, options.pool_frames - frames + 1, size)
            return np.stack([rng.integers(0, options.clips, size), starts], -1).astype(np.int32)

        stages = list(zip(options.frames, options.sharpness, strict=True))
        programs = [
            timed.compile(f"{frames} frames", trainer.update(frames, sharp), state, shape, rows(1))
            for frames, sharp in stages
        ]

        def render(seeds: range) -> jax.Array:
            # all pools have the same shapes, so that one compiled renderer serves
            return render_pool(
                seeds,
                options.pool_frames,
                height,
                width,
                mesh,
                workers=options.workers,
                batch=options.render,
            )

        first = options.first_seed
        pool = jax.block_until_ready(render(range(first, first + options.clips * mesh.size)))
        timed.note(event="pool", clips=options.clips * mesh.size, gib=pool.nbytes / 2**30)
        held_out = np.asarray(render(range(HELD_OUT_SEED, HELD_OUT_SEED + options.held_out)))
        held_out = held_out.reshape(-1, *held_out.shape[2:])
        timed.note(event="held out", clips=len(held_out), parameters=count(trainer.abstract))

        def next_call(fraction: float) -> Call:
            stage = min(int(fraction * len(stages)), len(stages) - 1)
            return Call(programs[stage].result(), pool, rows(stages[stage][0]))

        state = timed.train(state, next_call)
    finish(timed, trainer, state, pool, held_out)


def finish(
    timed: TimedRun, trainer: Trainer, state: TrainState, pool: jax.Array, held_out: np.ndarray
) -> None:
    """Saves, exports and measures: what a run must leave comes first."""
    first = jax.devices()[0]
    part = next(s.data[0] for s in pool.addressable_shards if s.device == first)
    average = trainer.statistics(jax.device_put(state.model.best, first), part)
    learner = dataclasses.replace(state.model, average=average)
    timed.save(dataclasses.replace(state, learners={MODEL: learner}))
    export_vae(trainer.config, average, timed.out / "vae", "bfloat16")
    report = trainer.measure(average, held_out)
    save_sheet(timed.out / "held_out.jpg", report.pop("shown"))
    spread = np.asarray(average["latents_std"])
    report.update(
        steps=int(state.step),
        parameters=count(average),
        latents_std=[float(spread.min()), float(np.median(spread)), float(spread.max())],
        latents_mean_largest=float(np.abs(np.asarray(average["latents_mean"])).max()),
    )
    timed.note(**report)
    (timed.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
