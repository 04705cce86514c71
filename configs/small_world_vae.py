"""The video autoencoder of the small world.

python -m sanawm_jax.small_world.generate --data_dir DATA --scenes 8192
python train.py --config=configs/small_world_vae.py --workdir=DIR --config.data_dir=DATA
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The run takes about seven minutes on one 80 GB accelerator, which holds all clips."""
    from sanawm_jax.vae.config import SMALL_WORLD_VAE

    config = common.training("vae")
    config.vae = ConfigDict(dataclasses.asdict(SMALL_WORLD_VAE), convert_dict=False)
    config.clip_frames = 17
    config.loss = ConfigDict(dict(charbonnier=0.5, squared=2.0, edges=0.25, kl=1e-4, scales=1))
    config.statistics_clips = 256  # clips from which the latents' mean and deviation are measured

    config.batch_size = 32
    config.max_minutes = 7.0
    config.ema_decay = 0.998
    config.optimizer.update(name="muon", learning_rate=2e-3, warmup_steps=300)
    return config
