"""Stage 1 of the small world, a DiT with about twelve million parameters.

python train.py --config=configs/small_world.py --workdir=DIR --config.data_dir=DATA
    --config.vae_dir=VAE_DIR/export/vae
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The run takes about eleven minutes on one 80 GB accelerator, after the clips are encoded."""
    config = common.training("dit")
    config.update(common.stage1())
    config.text_dir = ""  # a folder with text_encoder/ and tokenizer/; empty: make small ones
    config.text_width = 128
    config.text_length = 300
    config.cache_batch = 16
    config.views = 4  # versions of each clip: unchanged, mirrored, reversed, both
    config.dit = ConfigDict(
        dict(
            num_layers=8,
            hidden_size=256,
            num_attention_heads=8,
            linear_head_dim=32,
            patch_size=(1, 2, 2),
            softmax_every_n=4,
            chunk_plucker_post_attn_blocks=8,
            mlp_ratio=1.5,
        )
    )
    config.unroll = True

    config.batch_size = 64
    config.max_minutes = 11.0
    config.ema_decay = 0.999
    config.optimizer.update(name="muon", learning_rate=1e-3, weight_decay=0.01)
    return config
