"""Distillation: a causal student with few steps. docs/distillation.md explains the stages.

    python train.py --config=configs/distill.py:smoke --workdir=DIR
    python train.py --config=configs/distill.py:consistency --workdir=DIR --config.data_dir=LATENTS
        --config.teacher=CHUNK_CAUSAL_RUN

The stages `ode_t43`, `self_forcing_t43` and `self_forcing_t121` have the values that NVlabs
published for the 2.66 B network. The other stages are our own, for small networks.
"""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import common

_LISTS = (1000, 967, 908, 764, 0)


def _base(task: str) -> ConfigDict:
    config = common.training(task)
    stage1 = common.stage1()
    # the frozen network: the folder of a run, a stage-1 folder in either layout, or a hub name;
    # empty: random weights of the sizes in `dit`
    config.teacher = ""
    config.allow_pickle = False  # True: also read upstream's model.pt
    config.numerics = ""  # a preset of sanawm_jax/dit/numerics.py; empty: that of the folder
    config.dit = ConfigDict()
    config.data = common.stage1_data()
    config.on_device = False  # True: all clips lie on the device (npy format)
    config.frames = 0  # latent frames of a clip that are used; 0: all
    config.use_camera = True
    config.remat = "none"
    config.unroll = False  # True: slower to compile, and faster where layers are small
    # chunks of `size` latent frames after a first one of `first` (0: size + 1). The softmax layers
    # see `cached` earlier chunks (-1: all); with a sink, one of them is the first chunk
    config.window = ConfigDict(dict(first=0, size=3, cached=-1, sink=False))
    config.denoising_step_list = _LISTS  # timesteps of the student's levels, and 0
    # how the student goes from level to level in training: with fresh noise, as published, or by
    # Euler steps, as it is sampled
    config.renoise = True
    # weights: the folder that the learner starts from; empty: the teacher. A lora.rank above 0
    # trains adapters on these weights
    config.student = ConfigDict(dict(weights="", lora=stage1.lora.to_dict()))
    # the last clips of the data are never trained on. After every `every` steps (0: never) the
    # student makes them, and workdir/best gets the best weights so far; `patience` measurements
    # that are no better (0: any number) end the run
    config.held_out = ConfigDict(dict(clips=0, every=0, patience=0, batch=8))
    return config


def _self_forcing() -> ConfigDict:
    config = _base("self_forcing")
    config.student_every = 5  # updates of the critic per update of the student
    config.critic = ConfigDict(
        dict(
            weights="",
            lora=config.student.lora.to_dict(),
            optimizer=config.optimizer.to_dict(),
        )
    )
    # noise of the clips that teacher and critic compare; guidance is added to the conditional
    # estimate, so that the scale in the usual convention is one more
    # causal: the teacher is chunk-causal, and so is the critic
    config.score = ConfigDict(
        dict(shift=10.0, lowest=20.0, highest=980.0, guidance=3.0, causal=False)
    )
    published = dict(betas=(0.0, 0.999), eps=1e-8, weight_decay=0.0, clip_norm=10.0, warmup_steps=0)
    config.optimizer.update(**published, learning_rate=1e-5, schedule="constant")
    config.critic.optimizer.update(**published, learning_rate=2e-6, schedule="constant")
    config.ema_decay = 0.0
    return config


def _released(config: ConfigDict) -> ConfigDict:
    """The sizes and the precision of the released network."""
    config.dtype = "bfloat16"
    config.numerics = "trainer"
    # as published, a loss that is no number ends the run; skipping would keep the state twice
    config.spike.policy = "none"
    config.remat = "full"
    config.steps_per_call = 1
    config.log_every = 10
    config.frames = 43
    config.synthetic = ConfigDict(dict(clips=8, latent_frames=43, height=22, width=40, captions=4))
    return config


def _ode_t43() -> ConfigDict:
    config = _released(_base("ode"))
    config.data.format = "ode_lmdb"
    config.seed = 42
    config.mesh.update(data=8)
    config.batch_size = 8
    config.steps = 3000
    config.save_every = 500
    config.ema_decay = 0.0
    config.optimizer.update(
        learning_rate=2e-5,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        clip_norm=1.0,
        warmup_steps=0,
        schedule="constant",
    )
    return config


def _self_forcing_t43() -> ConfigDict:
    config = _released(_self_forcing())
    config.mesh.update(data=2, context=4)
    config.batch_size = 2
    config.steps = 700
    config.save_every = 100
    return config


def _self_forcing_t121() -> ConfigDict:
    config = _self_forcing_t43()
    config.frames = config.synthetic.latent_frames = 121
    config.window.update(cached=2, sink=True)
    config.steps = 3000
    return config


def _small(config: ConfigDict) -> ConfigDict:
    """Our own values for networks of up to some ten million parameters on one accelerator."""
    config.on_device = True
    config.batch_size = 64
    config.steps_per_call = 10
    config.save_every = 500
    config.steps = 4000
    config.renoise = False
    config.denoising_step_list = (1000, 900, 750, 500, 0)  # a shift of 3, and even steps
    config.optimizer.update(learning_rate=1e-4, betas=(0.9, 0.99), warmup_steps=100)
    return config


def _consistency() -> ConfigDict:
    config = _small(_base("consistency"))
    # steps of the teacher's sampler, its guidance (1: none), and the size of an error from which
    # the loss grows as its absolute value (0: the squared error)
    config.consistency = ConfigDict(dict(teacher_steps=40, guidance=1.0, huber=0.03))
    config.ema_decay = 0.99  # of the average, which is the target
    return config


def _to_truth() -> ConfigDict:
    config = _small(_base("self_forcing_to_truth"))
    # share of batches whose chunks see the student's own history, at first, and after the share
    # `ramp` of the steps; the largest level of the history's noise; huber as in consistency
    config.truth = ConfigDict(
        dict(share_first=0.25, share_last=0.75, ramp=0.5, history_noise=0.1, huber=0.0)
    )
    config.ema_decay = 0.99
    return config


def _small_self_forcing() -> ConfigDict:
    config = _small(_self_forcing())
    config.optimizer.update(learning_rate=2e-5, betas=(0.0, 0.999), schedule="constant")
    config.critic.optimizer.update(learning_rate=1e-5, warmup_steps=0)
    config.score.update(shift=3.0, guidance=0.0, causal=True)
    config.steps = 1000
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.dtype = "float32"
    config.dit.update(
        in_channels=8,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        caption_channels=16,
        mlp_ratio=1.5,
    )
    config.synthetic = ConfigDict(dict(clips=16, latent_frames=10, height=4, width=4, captions=4))
    config.batch_size = 2
    config.steps = 12
    config.steps_per_call = 1
    config.save_every = 6
    config.log_every = 5
    config.export_dtype = "float32"
    return config


def _smoke() -> ConfigDict:
    config = _tiny(_self_forcing())
    config.window.update(cached=2, sink=True)
    config.use_camera = False  # halves the time to compile, which is nearly all of the run
    config.optimizer.learning_rate = 1e-3
    config.critic.optimizer.learning_rate = 1e-3
    return config


_STAGES: dict[str, Callable[[], ConfigDict]] = {
    "smoke": _smoke,
    "consistency": _consistency,
    "self_forcing": _small_self_forcing,
    "self_forcing_to_truth": _to_truth,
    "ode_t43": _ode_t43,
    "self_forcing_t43": _self_forcing_t43,
    "self_forcing_t121": _self_forcing_t121,
}


def get_config(stage: str = "smoke") -> ConfigDict:
    """Returns the configuration of a stage; see `_STAGES` for the names."""
    if stage not in _STAGES:
        raise ValueError(f"no stage {stage!r}; use one of {', '.join(_STAGES)}")
    return _STAGES[stage]()
