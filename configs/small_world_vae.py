"""The small world's video autoencoder.

python -m sanawm_jax.data.generate --data_dir DATA
python train.py --config=configs/small_world_vae.py --workdir=DIR --config.data_dir=DATA
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """About six minutes on one 141 GB accelerator."""
    from sanawm_jax.vae.config import SMALL_WORLD_VAE

    config = ConfigDict()
    config.task = "vae"
    config.seed = 0
    config.dtype = "auto"
    config.data_dir = ""  # empty: render the clips below, for a first try
    config.synthetic = ConfigDict(dict(clips=16, num_frames=17, height=128, width=128))
    config.vae = ConfigDict(dataclasses.asdict(SMALL_WORLD_VAE), convert_dict=False)
    config.clip_frames = 17
    config.loss = ConfigDict(dict(charbonnier=1.0, squared=1.0, edges=0.5, kl=1e-4, scales=2))

    config.batch_size = 32
    config.steps_per_call = 10
    config.num_steps = 20_000
    config.max_minutes = 6.0  # 0: no limit
    config.ema_decay = 0.998
    config.optimizer = ConfigDict(
        dict(
            learning_rate=5e-4,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=1.0,
            warmup_steps=200,
            schedule="cosine",
            final_fraction=0.02,
        )
    )
    config.save_every = 1000
    config.keep_checkpoints = 1
    config.log_every = 100
    config.statistics_clips = 512
    config.export_dtype = "bfloat16"
    return config
