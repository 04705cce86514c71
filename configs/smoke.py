"""A tiny stage-1 run on synthetic latents, to test whether training works on a machine or a mesh.

python train.py --config=configs/smoke.py --workdir=DIR
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The run takes between half a minute and a few minutes on a CPU, and needs no data or VAE."""
    config = common.training("stage1")
    config.dtype = "float32"
    config.update(common.stage1())
    config.data = common.stage1_data()
    config.synthetic = ConfigDict(
        dict(clips=32, latent_frames=16, height=4, width=4, captions=4)  # size of the latent grid
    )
    config.dit = ConfigDict(
        dict(
            in_channels=8,
            num_layers=4,
            hidden_size=64,
            num_attention_heads=4,
            linear_head_dim=16,
            caption_channels=32,
            mlp_ratio=1.5,
        )
    )

    config.batch_size = 8
    config.steps = 30
    config.steps_per_call = 1
    config.save_every = 5
    config.keep_checkpoints = 2
    config.log_every = 5
    config.ema_decay = 0.9
    config.export_dtype = "float32"
    config.optimizer.update(learning_rate=2e-3, warmup_steps=5, schedule="constant")
    return config
