"""The chunk-causal stage 1 of the release. Chunks of three latent frames do not see later chunks.

python train.py --config=configs/stage1_chunk_causal.py --workdir=DIR --config.data_dir=LATENTS
    --config.init_weights=SANA-WM_bidirectional-diffusers
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import stage1_bidirectional


def get_config() -> ConfigDict:
    """The published fine-tuning. Each chunk has its noise level, which is drawn in four ways."""
    config = stage1_bidirectional.get_config()
    config.chunk_size = 3
    return config
