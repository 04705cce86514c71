"""LoRA fine-tuning of the released world model, adapters on its attention.

python train.py --config=configs/lora.py --workdir=DIR --config.data_dir=LATENTS

Rank and targets are ours: no recipe for adapters of stage 1 is published.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import stage1_bidirectional


def get_config() -> ConfigDict:
    """`export/lora/` holds the adapters for PEFT, `export/transformer/` the weights with them."""
    config = stage1_bidirectional.get_config()
    config.init_weights = "Efficient-Large-Model/SANA-WM_bidirectional-diffusers"
    config.lora.rank = 32
    config.optimizer.learning_rate = 1e-4
    return config
