"""Trains the small world's video autoencoder on clips that the accelerator renders itself.

    python -m sanawm_jax.small_world.train_vae --out DIR --minutes 6 --clips 6400 --workers 16

Writes DIR/vae (diffusers layout), DIR/state (a compact state; the same command with --resume goes
on from it), DIR/log.jsonl and DIR/report.json with the figures on held-out clips.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.params import Params, apply, build, init
from sanawm_jax.data.latent_cache import to_signed
from sanawm_jax.small_world.compact import load_compact, save_compact
from sanawm_jax.small_world.scenery.clip import HELD_OUT_SEED
from sanawm_jax.small_world.scenery.pool import render_pool
from sanawm_jax.small_world.scenery.render import HEIGHT, WIDTH
from sanawm_jax.training.engine.learner import Learner, UpdateRule
from sanawm_jax.training.engine.optimizer import learning_rate, make_optimizer
from sanawm_jax.training.objectives.vae_loss import VAELossWeights, vae_loss
from sanawm_jax.training.recipes.clips import crop_clips
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.keys import load_vae
from sanawm_jax.vae.latents import sample_posterior
from sanawm_jax.vae.model import VideoVAE

STEPS_PER_CALL = 20


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


def gradient_energy(video: jax.Array) -> jax.Array:
    """Mean squared difference of neighbouring pixels, per frame of (..., H, W, 3)."""
    across = jnp.square(jnp.diff(video, axis=-2)).mean((-3, -2, -1))
    return across + jnp.square(jnp.diff(video, axis=-3)).mean((-3, -2, -1))


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
    """One autoencoder's training: a jitted run of steps over a pool of packed clips."""

    def __init__(self, config: VAEConfig, options: argparse.Namespace):
        self.config, self.options = config, options
        self.graphdef, _ = build(VideoVAE, config)
        on_cpu = jax.default_backend() == "cpu"
        self.dtype = jnp.float32 if on_cpu else jnp.bfloat16
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
        self.run = jax.jit(self._run, donate_argnums=0)

    def start(self) -> dict[str, Any]:
        """A new state."""
        params = init(VideoVAE, self.config, jax.random.key(self.options.seed))
        return {
            "params": params,
            "average": jax.tree.map(jnp.copy, params),
            "moments": self.rule.optimizer.init(params),
            "step": jnp.int32(0),
        }

    def encode(self, params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance, float32."""
        moments = apply(self.graphdef, params, video.astype(self.dtype), method="encode")
        return moments[0].astype(jnp.float32), moments[1].astype(jnp.float32)

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Video of latents as the encoder gives them, float32."""
        video = apply(self.graphdef, params, latents.astype(self.dtype), method="decode")
        return video.astype(jnp.float32)

    def _loss(self, params, video, key):
        mean, logvar = self.encode(params, video)
        latents = sample_posterior(mean, logvar, jax.random.normal(key, mean.shape))
        decoded = self.decode(params, latents)
        loss, terms = vae_loss(decoded, video, mean, logvar, self.weights)
        sharp = sharpness_loss(decoded, video, min(16, *video.shape[2:4]))
        loss = loss + self.options.sharpness * sharp
        return loss, {"loss": loss, "sharpness": sharp, **terms}

    def _run(self, state, pool, fraction):
        frames, batch = self.options.frames, self.options.batch

        def step(state, _):
            key = jax.random.fold_in(jax.random.key(self.options.seed + 1), state["step"])
            rows_key, starts_key, noise_key = jax.random.split(key, 3)
            rows = jax.random.randint(rows_key, (batch,), 0, len(pool))
            starts = jax.random.randint(starts_key, (batch,), 0, pool.shape[1] - frames + 1)
            video = to_signed(crop_clips(pool, rows, starts, frames))
            grads, terms = jax.grad(self._loss, has_aux=True)(state["params"], video, noise_key)
            learner = Learner(state["params"], state["moments"], state["average"])
            learner, _ = self.rule.update(learner, grads, state["step"], fraction)
            new = {
                "params": learner.params,
                "average": learner.average,
                "moments": learner.moments,
            }
            return {**new, "step": state["step"] + 1}, terms

        state, terms = jax.lax.scan(step, state, length=STEPS_PER_CALL)
        return state, jax.tree.map(jnp.mean, terms)

    def statistics(self, params: Params, pool: jax.Array, clips: int = 512) -> Params:
        """`params` with the latents' mean and deviation, (C,), of clips of the pool."""
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

    def measure(self, params: Params, held_out: jax.Array) -> dict[str, Any]:
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
                both = np.stack([np.asarray(unpack(part)), np.asarray(values[2])], 1)
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


def save_sheet(path: Path, shown: np.ndarray) -> None:
    """Contact sheet: of each clip the truth above what the autoencoder makes of it."""
    from PIL import Image

    rows = [np.concatenate(list(strip), 1) for pair in shown for strip in pair]
    sheet = np.clip((np.concatenate(rows) + 1.0) * 127.5, 0, 255).astype(np.uint8)
    Image.fromarray(sheet).save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--clips", type=int, default=6400, help="training scenes")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--pool_frames", type=int, default=49, help="frames of each clip")
    parser.add_argument(
        "--held_out", type=int, default=64, help="held-out clips, a multiple of --render"
    )
    parser.add_argument("--render", type=int, default=32, help="clips rendered at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that plan scenes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--frames",
        type=int,
        default=41,
        help="of each example; a decoder that saw 17 fails beyond them",
    )
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--edges", type=float, default=0.35)
    parser.add_argument("--sharpness", type=float, default=0.5, help="of `sharpness_loss`")
    parser.add_argument("--kl", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(HEIGHT, WIDTH))
    parser.add_argument("--init", help="vae/ folder whose weights the run begins with")
    parser.add_argument("--resume", help="folder of a compact state to go on from")
    options = parser.parse_args(argv)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    height, width = options.size
    clock = time.time()
    log = (out / "log.jsonl").open("a")

    def note(**facts):
        line = json.dumps({"seconds": round(time.time() - clock, 1), **facts})
        log.write(line + "\n")
        log.flush()
        print(line, flush=True)

    seeds = range(options.first_seed, options.first_seed + options.clips)
    pool, _ = render_pool(
        seeds, options.pool_frames, height, width, workers=options.workers, batch=options.render
    )
    jax.block_until_ready(pool)
    note(event="pool", clips=len(pool), gib=pool.nbytes / 2**30)
    held = range(HELD_OUT_SEED, HELD_OUT_SEED + options.held_out)
    # the same shapes as above, so that one compiled renderer serves
    held_out, _ = render_pool(
        held, options.pool_frames, height, width, workers=options.workers, batch=options.render
    )
    note(event="held out", clips=len(held_out))
    trainer = Trainer(vae_config(options.channels, options.width), options)
    state = trainer.start()
    if options.init:
        params = load_vae(options.init, dtype=np.float32)[1]
        params = jax.tree.map(jnp.asarray, params)
        state.update(params=params, average=jax.tree.map(jnp.copy, params))
    if options.resume:
        state = load_compact(options.resume, state)
    count = sum(x.size for x in jax.tree.leaves(state["params"]))
    began = time.time()
    fraction, calls = 0.0, 0
    while fraction < 1.0:
        state, terms = trainer.run(state, pool, jnp.float32(fraction))
        calls += 1
        if calls == 1:  # compilation does not count
            jax.block_until_ready(state)
            note(event="compiled", parameters=count)
            began = time.time()
        fraction = min((time.time() - began) / 60 / options.minutes, 1.0)
        if calls % 25 == 1:
            note(step=int(state["step"]), **{k: round(float(v), 5) for k, v in terms.items()})
    finish(out, trainer, state, pool, held_out, note)


def finish(out: Path, trainer: Trainer, state, pool, held_out, note) -> None:
    """Measures, exports and saves the run."""
    from sanawm_jax.checkpoints.export import export_vae

    average = trainer.statistics(state["average"], pool)
    report = trainer.measure(average, held_out)
    save_sheet(out / "held_out.png", report.pop("shown"))
    spread = np.asarray(average["latents_std"])
    report.update(
        steps=int(state["step"]),
        parameters=sum(x.size for x in jax.tree.leaves(average)),
        latents_std=[float(spread.min()), float(np.median(spread)), float(spread.max())],
        latents_mean_largest=float(np.abs(np.asarray(average["latents_mean"])).max()),
    )
    note(**report)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    export_vae(trainer.config, average, out / "vae", "bfloat16")
    save_compact(out / "state", state)


if __name__ == "__main__":
    main()
