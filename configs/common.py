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
            moments_dtype="float32",  # of the first moments; or bfloat16
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
    # updates that are left out: policy none, skip or stop; see sanawm_jax/training/engine/spikes.py
    config.spike = ConfigDict(dict(policy="skip", factor=10.0, window=100, patience=10))
    config.save_every = 2000
    config.keep_checkpoints = 1  # the latest
    config.keep_best_checkpoints = 1  # by the mean loss since the save before
    config.keep_period = 0  # every one at a multiple of this stays; 0: none
    config.log_every = 100
    # what else shows the log's numbers; both are optional extras
    config.tensorboard = False  # workdir/tensorboard
    config.wandb = ConfigDict(dict(project="", name="", mode="online"))  # no project: off
    config.curves = True  # workdir/curves.png at checkpoints, if matplotlib is there
    # jax.profiler into workdir/profile: from step `start` on (0: never), or when a file
    # workdir/PROFILE appears
    config.profile = ConfigDict(dict(start=0, steps=3))
    config.export_dtype = "bfloat16"
    return config


def stage1() -> ConfigDict:
    """What every run of a stage-1 network has besides: objective, chunks, adapters, samples."""
    return ConfigDict(
        dict(
            # a folder in diffusers or upstream layout to start from, or a hub name; empty: random
            init_weights="",
            # rank 0 trains all weights; targets are paths of linear layers; alpha 0 is the rank
            lora=dict(rank=0, alpha=0.0, targets=(r".*\.(attn|cross_attn)\.(qkv|q|kv|out)",)),
            flow_shift=3.0,
            image_prob=0.9,  # clips whose first latent frame is given
            caption_dropout=0.1,
            use_camera=True,  # False: the network runs without poses and rays
            remat="none",  # or dots, full, parts; see docs/training.md
            unroll=False,
            # the bidirectional model's fields of the chunk layout; see docs/training.md
            chunk_size=0,  # latent frames a chunk; 0: bidirectional
            chunk_split_strategy="first_chunk_plus_one",  # or uniform, first_frame
            # weights of how the chunks of a clip get their noise steps
            chunk_mixture=dict(
                same_t=0.1, incremental=0.4, last_chunk_anchor=0.4, teacher_forcing_clean=0.1
            ),
            # films in workdir/samples; every: steps, 0 for none
            samples=dict(every=0, clips=2, steps=20),
            vae_dir="",  # decodes them, and what the task `dit` encodes clips with
        )
    )


def stage1_data() -> ConfigDict:
    """How stage 1 reads `data_dir`; see docs/data.md."""
    return ConfigDict(
        dict(
            # npy: what data/latent_cache.py writes; zip_latents: upstream's zips, read as needed
            format="npy",
            # all that follows is of zip_latents
            latent_dir="",  # of the latent zips; empty: data_dir holds raw/ and latents/
            num_frames=961,  # pixel frames; longer clips are cut, shorter ones left out
            repeat=1,  # how often a clip comes in an epoch
            filters=(),  # ((suffix, lowest, highest score), ...)
            captions=(),  # ((suffix, weight), ...); a clip without any of them takes its prompt
            min_latent_file_size=10 * 2**20,  # bytes; a smaller entry is left out
            max_bad_fraction=0.05,  # of samples that cannot be read, above which a run stops...
            min_bad=10,  # ...once there are so many
            text_dir="",  # folder whose text encoder reads the captions; empty: init_weights
            text_cache="",  # where encoded captions are kept; empty: workdir/text
            text_length=300,
            num_workers=4,  # processes that read ahead; 0: this one does
            num_threads=1,  # that read ahead, in each process
            buffer=2,  # batches that each keeps ready
        )
    )
