"""LoRA fine-tuning of the released world model, with adapters on its attention.

python train.py --config=configs/lora.py --workdir=DIR --config.data_dir=LATENTS

The rank and the targets are our own, because no recipe for adapters of stage 1 is published.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import stage1_bidirectional


def get_config() -> ConfigDict:
    """Returns the configuration.

    The run writes the adapters for PEFT to `export/lora/`, and the merged weights to
    `export/transformer/`.
    """
    config = stage1_bidirectional.get_config()
    config.init_weights = "Efficient-Large-Model/SANA-WM_bidirectional-diffusers"
    config.lora.rank = 32
    config.optimizer.learning_rate = 1e-4
    return config
