"""The small world's stage 1, a DiT of about fourteen million parameters.

python train.py --config=configs/small_world.py --workdir=DIR --config.data_dir=DATA
    --config.vae_dir=VAE_DIR/export/vae
"""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """About fourteen minutes on one 141 GB accelerator, after encoding the clips."""
    config = ConfigDict()
    config.task = "dit"
    config.seed = 0
    config.dtype = "auto"
    config.data_dir = ""  # empty: render the clips below, for a first try
    config.synthetic = ConfigDict(dict(clips=16, num_frames=17, height=128, width=128))
    config.vae_dir = ""
    config.text_dir = ""  # holds text_encoder/ and tokenizer/; empty: make the small ones
    config.text_width = 128
    config.text_length = 300
    config.cache_batch = 16
    config.dit = ConfigDict(
        dict(
            num_layers=8,
            hidden_size=256,
            num_attention_heads=8,
            linear_head_dim=32,
            softmax_every_n=4,
            chunk_plucker_post_attn_blocks=8,
            mlp_ratio=2.5,
        )
    )
    config.remat = "none"
    config.flow_shift = 3.0
    config.image_prob = 0.9
    config.caption_dropout = 0.1

    config.batch_size = 128
    config.steps_per_call = 10
    config.num_steps = 40_000
    config.max_minutes = 14.0  # 0: no limit
    config.ema_decay = 0.9995
    config.optimizer = ConfigDict(
        dict(
            learning_rate=6e-4,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.01,
            clip_norm=1.0,
            warmup_steps=500,
            schedule="cosine",
            final_fraction=0.02,
        )
    )
    config.save_every = 2000
    config.keep_checkpoints = 1
    config.log_every = 100
    config.export_dtype = "bfloat16"
    return config
