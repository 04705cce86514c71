"""The small world's stage 2: a small LTX-2 refiner, first its base, then adapters on it.

    python train.py --config=configs/small_world_refiner.py --workdir=BASE --config.data_dir=DATA
        --config.stage1_dir=STAGE1/export
    python train.py --config=configs/small_world_refiner.py --workdir=LORA --config.data_dir=DATA
        --config.stage1_dir=STAGE1/export --config.base_dir=BASE/export --config.lora.rank=16
        --config.cache_dir=BASE/latents --config.max_minutes=3

`sample.py --config=configs/sample_small_world.py --weights STAGE1/export --refiner_weights
BASE/export` or `LORA/export` refines with what they export.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, refiner


def get_config() -> ConfigDict:
    """Six and a half million parameters; ten minutes on one 80 GB accelerator, after the pairs."""
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
            # 49 frames at 16 a second, 128 pixels: positions reach the whole range of angles
            pos_embed_max_pos=4,
            base_height=128,
            base_width=128,
            rope_type="split",
            # of the audio half, which is neither run nor exported
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
        )
    )
    # Stage 1's clip under noise of the release's 0.909 has 1% of the signal left. A frame of the
    # release has 880 x 128 numbers to find it in, one of the small world's 256 x 48, and the small
    # network would lose the camera's path.
    config.sigmas = (0.5, 0.15, 0.0)

    # sampling a clip of 7 latent frames has two blocks: one sees the sink, one also the first block
    config.objective = "stream"
    config.stream.window = 1
    config.stream.curriculum.update(clean_steps=300, augment_steps=700, rollout_steps=1000)

    config.pairs.update(steps=10, cfg_scale=1.0, batch=128)
    config.batch_size = 64
    config.max_minutes = 10.0
    config.ema_decay = 0.999
    config.optimizer.update(name="muon", learning_rate=1e-3, weight_decay=0.01)
    return config
