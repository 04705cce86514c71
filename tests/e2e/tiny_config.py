"""Tiny training runs, `--config=tests/e2e/tiny_config.py:vae`, `:dit` or `:refiner`: 4 clips.

`:zip` is stage 1 on zip latents of the tiny random autoencoder, with 9 frames per clip.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_CONFIGS = Path(__file__).parents[2] / "configs"


def get_config(task: str) -> ConfigDict:
    """The shipped configuration of `task`, made small."""
    file = {
        "vae": "small_world_vae.py",
        "dit": "small_world.py",
        "refiner": "small_world_refiner.py",
        "zip": "smoke.py",
    }[task]
    config = runpy.run_path(str(_CONFIGS / file))["get_config"]()
    if task == "zip":
        config.dit.update(num_layers=1, hidden_size=32, num_attention_heads=2)
        config.data.update(format="zip_latents", num_frames=9, min_latent_file_size=0, repeat=2)
        config.data.update(text_length=8, num_workers=0)
        config.update(batch_size=2, steps=4, save_every=2, log_every=1, ema_decay=0.0)
        return config
    config.synthetic.update(clips=4, num_frames=9, height=32, width=32)
    config.update(batch_size=2, steps_per_call=2, steps=4, max_minutes=0.0, save_every=4)
    config.update(log_every=1)
    config.optimizer.update(schedule="constant", warmup_steps=1)
    if task == "vae":
        config.vae.update(
            latent_channels=8,
            block_out_channels=(16, 32, 32),
            decoder_block_out_channels=(16, 16, 16),
            decoder_layers_per_block=(1, 1, 1, 1),
        )
        config.clip_frames = 9
    elif task == "refiner":
        config.synthetic.num_frames = 33  # 5 latent frames: 0 | 1-3 | 4
        config.refiner.update(num_layers=2, num_attention_heads=2, attention_head_dim=16)
        config.text.update(length=48, registers=8)
        config.pairs.update(steps=2, batch=3)
        config.stream.window = 2  # one example a clip, whose history is chunk 1-3
        config.stream.curriculum.update(clean_steps=1, augment_steps=1, rollout_steps=1)
        config.update(text_length=48, cache_batch=2, views=1)
    else:
        config.dit.update(num_layers=2, hidden_size=32, num_attention_heads=2, linear_head_dim=16)
        config.dit.softmax_every_n = 2
        config.update(text_width=64, text_length=48, cache_batch=2)
    return config
