"""The smallest stage-1 run on synthetic latents. It has one softmax block and no cameras."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import smoke


def get_config() -> ConfigDict:
    config = smoke.get_config()
    config.dit.update(
        num_layers=1, softmax_every_n=1, hidden_size=16, num_attention_heads=1, ffn_type="mlp"
    )
    config.synthetic.update(clips=8, latent_frames=4, height=2, width=2)
    config.update(batch_size=4, steps=40, save_every=2, use_camera=False, curves=False)
    return config
