"""Stage 2 of the small world, a small LTX-2 refiner: first the base model, then its adapters.

    python train.py --config=configs/small_world_refiner.py --workdir=BASE --config.data_dir=DATA
        --config.stage1_dir=STAGE1/export
    python train.py --config=configs/small_world_refiner.py --workdir=LORA --config.data_dir=DATA
        --config.stage1_dir=STAGE1/export --config.base_dir=BASE/export --config.lora.rank=16
        --config.cache_dir=BASE/latents --config.max_minutes=3

The exported refiner is in BASE/export or LORA/export. To use it, run `sample.py
--config=configs/sample_small_world.py --weights STAGE1/export --refiner_weights BASE/export`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, refiner


def get_config() -> ConfigDict:
    """The refiner has 6.5 million parameters.

    The run takes ten minutes on one 80 GB accelerator, after stage 1 has sampled the pairs.
    """
    config = common.training("refiner")
    refiner.add_fields(config)
    config.synthetic.num_frames = 17
    config.views = 2
    config.cache_batch = 16
    config.text = ConfigDict(dict(width=64, layers=2, length=64, registers=16))
    config.refiner = ConfigDict(
        dict(
            num_layers=6,
            num_attention_heads=8,
            attention_head_dim=32,
            vae_scale_factors=(8, 8, 8),
            # For 49 frames at 16 frames per second and 128 pixels, the positions use the whole
            # range of the rotary angles.
            pos_embed_max_pos=4,
            base_height=128,
            base_width=128,
            rope_type="split",
            # Sizes of the audio half, which neither runs nor is exported.
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
        )
    )
    # At the release's first noise level of 0.909, only 1% of the power of stage 1's latents is
    # signal. A latent frame of the release has 880 x 128 numbers, from which the network can still
    # recover the signal. One of the small world has 256 x 48, and the network would lose the
    # camera's path.
    config.sigmas = (0.5, 0.15, 0.0)

    # A clip of 7 latent frames is sampled in two blocks. The first one attends to the sink, and the
    # second one to the sink and the first block.
    config.objective = "stream"
    config.stream.window = 1
    config.stream.curriculum.update(clean_steps=300, augment_steps=700, rollout_steps=1000)

    config.pairs.update(steps=10, cfg_scale=1.0, batch=128)
    config.batch_size = 64
    config.max_minutes = 10.0
    config.ema_decay = 0.999
    config.optimizer.update(name="muon", learning_rate=1e-3, weight_decay=0.01)
    return config
