"""What the small world's training runs share."""

from __future__ import annotations

from ml_collections import ConfigDict


def training(task: str) -> ConfigDict:
    """Fields that every run has; a configuration adds its own and changes what differs."""
    config = ConfigDict()
    config.task = task
    config.dry_run = False  # print parameters, memory and shardings, and stop
    config.seed = 0
    config.dtype = "auto"  # bfloat16 on an accelerator, float32 on a CPU
    config.data_dir = ""  # empty: render the clips below, for a first try
    config.synthetic = ConfigDict(dict(clips=16, num_frames=17, height=128, width=128))

    config.mesh = ConfigDict(dict(data=1, fsdp=1, context=1, tensor=1))  # see docs/sharding.md
    config.batch_size = 128  # of all devices together
    config.accumulation = 1  # parts that a batch is run in, to fit the memory
    config.steps_per_call = 10
    config.steps = 40_000
    config.max_minutes = 0.0  # stop by the clock, which the cosine follows; 0: no limit
    config.ema_decay = 0.9995  # 0: no average is kept, and the weights themselves are exported
    config.optimizer = ConfigDict(
        dict(
            name="adamw",  # or muon
            learning_rate=6e-4,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=1.0,
            warmup_steps=500,
            schedule="cosine",
            final_fraction=0.02,
        )
    )
    # updates that are left out: policy none, skip or stop; see sanawm_jax/training/spikes.py
    config.spike = ConfigDict(dict(policy="skip", factor=10.0, window=100, patience=10))
    config.save_every = 2000
    config.keep_checkpoints = 1  # the latest
    config.keep_best_checkpoints = 1  # by the mean loss since the save before
    config.keep_period = 0  # every one at a multiple of this stays; 0: none
    config.log_every = 100
    config.export_dtype = "bfloat16"
    return config


def chunks() -> ConfigDict:
    """The bidirectional model's fields of the chunk layout; see docs/training.md."""
    return ConfigDict(
        dict(
            chunk_size=0,  # latent frames a chunk; 0: bidirectional
            chunk_split_strategy="first_chunk_plus_one",  # or uniform, first_frame
            # weights of how the chunks of a clip get their noise steps
            chunk_mixture=dict(
                same_t=0.1, incremental=0.4, last_chunk_anchor=0.4, teacher_forcing_clean=0.1
            ),
        )
    )
