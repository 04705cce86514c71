"""Fields that the configurations of training runs share."""

from __future__ import annotations

from ml_collections import ConfigDict


def training(task: str) -> ConfigDict:
    """Returns the fields of every run. A configuration adds its own fields and changes values.

    Args:
      task: a name in `sanawm_jax/training/recipes/registry.py`.
    """
    config = ConfigDict()
    config.task = task
    config.dry_run = False  # True: print parameters, memory and shardings, and stop
    config.seed = 0
    config.dtype = "auto"  # bfloat16 on an accelerator, float32 on a CPU
    config.data_dir = ""  # empty: make the synthetic clips below, for a first test
    config.synthetic = ConfigDict(dict(clips=16, num_frames=17, height=128, width=128))

    config.mesh = ConfigDict(dict(data=1, fsdp=1, context=1, tensor=1))  # see docs/sharding.md
    config.batch_size = 128  # rows of all devices together
    config.accumulation = (
        1  # number of parts of a batch that run one after the other, to save memory
    )
    config.steps_per_call = 10
    config.steps = 40_000
    # the run stops after this time, and the cosine schedule follows the clock; 0: no limit
    config.max_minutes = 0.0
    config.ema_decay = 0.9995  # 0: there is no average, and the weights themselves are exported
    config.optimizer = ConfigDict(
        dict(
            name="adamw",  # or muon
            moments_dtype="float32",  # dtype of the first moments; or bfloat16
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
    # what to do with updates of a loss spike: policy none, skip or stop; see
    # sanawm_jax/training/engine/spikes.py
    config.spike = ConfigDict(dict(policy="skip", factor=10.0, window=100, patience=10))
    config.save_every = 2000
    config.keep_checkpoints = 1  # how many of the latest checkpoints are kept
    config.keep_best_checkpoints = 1  # how many of the best, by the mean loss since the last save
    config.keep_period = 0  # checkpoints at multiples of this step are always kept; 0: none
    config.log_every = 100
    # further outputs of the logged numbers; both need optional packages
    config.tensorboard = False  # writes workdir/tensorboard
    config.wandb = ConfigDict(dict(project="", name="", mode="online"))  # without a project: off
    config.curves = True  # draws workdir/curves.png at checkpoints, if matplotlib is installed
    # jax.profiler writes workdir/profile, from step `start` on (0: never), or when the file
    # workdir/PROFILE appears
    config.profile = ConfigDict(dict(start=0, steps=3))
    config.export_dtype = "bfloat16"
    return config


def stage1() -> ConfigDict:
    """Returns further fields of stage-1 runs: objective, chunks, adapters and samples."""
    return ConfigDict(
        dict(
            # the first weights: a folder in diffusers or upstream layout, or a hub name;
            # empty: random weights
            init_weights="",
            # rank 0 trains all weights; targets match paths of linear layers; alpha 0: the rank
            lora=dict(rank=0, alpha=0.0, targets=(r".*\.(attn|cross_attn)\.(qkv|q|kv|out)",)),
            flow_shift=3.0,
            image_prob=0.9,  # share of clips whose first latent frame is given
            caption_dropout=0.1,
            use_camera=True,  # False: the network gets no poses and no rays
            remat="none",  # or dots, full, parts; see docs/training.md
            unroll=False,
            # how a clip is divided into chunks; see docs/training.md
            chunk_size=0,  # latent frames per chunk; 0: bidirectional
            chunk_split_strategy="first_chunk_plus_one",  # or uniform, first_frame
            # probabilities of the ways in which the chunks of a clip get their noise levels
            chunk_mixture=dict(
                same_t=0.1, incremental=0.4, last_chunk_anchor=0.4, teacher_forcing_clean=0.1
            ),
            # True: every frame continues the frames before it, which are a second copy of the clip
            # with little noise; needs chunk_size=1, and replaces chunk_mixture
            teacher_forcing=False,
            history_noise=0.3,  # highest noise level of that copy
            cached_chunks=0,  # earlier chunks that softmax sees, one of them the first; 0: all
            loss_weight="velocity",  # or ramp, see sanawm_jax/training/objectives/flow.py
            # sampled videos in workdir/samples, after every `every` training steps; 0: none
            samples=dict(every=0, clips=2, steps=20),
            vae_dir="",  # the VAE that decodes samples, and encodes the clips of the task `dit`
        )
    )


def stage1_data() -> ConfigDict:
    """Returns the fields that say how stage 1 reads `data_dir`; see docs/data.md."""
    return ConfigDict(
        dict(
            # npy: the files of data/latent_cache.py; zip_latents: upstream's zips, read on demand
            format="npy",
            # all following fields are only for zip_latents
            latent_dir="",  # folder of the latent zips; empty: data_dir holds raw/ and latents/
            num_frames=961,  # pixel frames; longer clips are cut, shorter ones are not used
            repeat=1,  # how often a clip comes in an epoch
            filters=(),  # ((suffix, lowest, highest score), ...)
            captions=(),  # ((suffix, weight), ...); a clip without any of them uses its prompt
            min_latent_file_size=10 * 2**20,  # bytes; clips with smaller latents are not used
            # a run stops when at least min_bad samples, and a larger share than max_bad_fraction,
            # could not be read
            max_bad_fraction=0.05,
            min_bad=10,
            text_dir="",  # folder whose text encoder reads the captions; empty: init_weights
            text_cache="",  # folder of the encoded captions; empty: workdir/text
            text_length=300,
            num_workers=4,  # processes that read ahead; 0: threads of the training process
            num_threads=1,  # threads per process that read ahead
            buffer=2,  # batches that each thread or process keeps ready
        )
    )
