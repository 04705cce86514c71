"""Stage 2 at the released size: LoRA of rank 384 on LTX-2's video self-attention.

    python train.py --config=configs/refiner.py --workdir=DIR --config.data_dir=DATA
        --config.stage1_dir=Efficient-Large-Model/SANA-WM_bidirectional-diffusers
        --config.base_dir=LTX2_REFINER

Rank, targets, first noise level, chunks, window and curriculum are those of NVlabs/Sana. The
learning rate of this stage is not published, so it is that of stage 1.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def add_fields(config: ConfigDict) -> None:
    """Adds the fields that every training run of a refiner has in addition to `common.training`."""
    config.stage1_dir = ""  # a stage-1 folder; its VAE and text encoder are used too
    # a refiner folder to start from; empty: a new refiner with the sizes `refiner` and `text`
    config.base_dir = ""
    config.cache_dir = ""  # encoded clips and pairs of another run; empty: workdir/latents
    # rank 0 trains all weights; targets match paths of linear layers; alpha 0: the rank
    config.lora = ConfigDict(dict(rank=0, alpha=0.0, targets=(r"blocks\.attn\.(q|k|v)",)))
    # how stage 1 samples the training clips, once
    config.pairs = ConfigDict(dict(steps=20, cfg_scale=1.0, seeds=1, batch=1))

    config.objective = "clip"  # or stream
    config.levels = "uniform"  # or shifted_logit_normal
    # noise levels of a new refiner's sampling steps; empty: those of the release. A refiner in
    # base_dir has its own
    config.sigmas = ()
    config.stage1_noise = (0.0, 0.0)  # lowest and highest level of the noise added to stage 1
    config.sink_frames = 1
    config.stream = ConfigDict(
        dict(
            first=1,
            chunk=3,
            window=2,
            curriculum=dict(
                clean_steps=500,
                augment_steps=2000,
                rollout_steps=2500,
                augmented=(0.3, 0.7, 0.0),
                final=(0.2, 0.3, 0.5),
            ),
            corruption=dict(
                noise=0.1, gain=0.15, blur=0.2, channel_dropout=0.1, mixup=0.0, token_dropout=0.0
            ),
        )
    )
    config.fps = 16.0
    config.remat = "none"
    config.text_length = 300  # tokens of stage 1's captions


def get_config() -> ConfigDict:
    """Returns the configuration of the released size."""
    config = common.training("refiner")
    add_fields(config)
    config.views = 1
    config.cache_batch = 1
    config.lora.rank = 384
    config.objective = "stream"
    config.levels = "shifted_logit_normal"
    config.remat = "full"

    config.batch_size = 1
    config.steps_per_call = 1
    config.steps = 10_000
    config.optimizer.update(
        learning_rate=1e-5,
        betas=(0.9, 0.999),
        eps=1e-10,
        clip_norm=0.5,
        warmup_steps=0,
        schedule="constant",
    )
    return config
