"""The bidirectional stage 1 of the release, a 2.66 B DiT, fine-tuned on 60 s clips of 704 x 1280.

python train.py --config=configs/stage1_bidirectional.py --workdir=DIR --config.data_dir=LATENTS
    --config.init_weights=SANA-WM_bidirectional-diffusers
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The optimizer, noise and mesh are the published ones; docs/training.md lists the others."""
    config = common.training("stage1")
    config.seed = 3407
    # dtype of the computation; weights, moments and sums of gradients are float32
    config.dtype = "bfloat16"
    config.update(common.stage1())
    config.data = common.stage1_data()
    # without data_dir: the shapes of the published example set, 961 frames of 704 x 1280
    config.synthetic = ConfigDict(dict(clips=8, latent_frames=121, height=22, width=40, captions=4))
    config.dit = ConfigDict()  # the sizes of the release
    config.remat = "full"
    config.flow_shift = 9.95

    # Eight devices are four pairs. A pair divides the frames of a clip; the pairs divide the
    # weights.
    config.mesh.update(fsdp=4, context=2)
    config.batch_size = 4
    config.steps = 100_000
    config.steps_per_call = 1
    config.ema_decay = 0.0
    config.save_every = 50
    config.log_every = 10
    config.optimizer.update(
        learning_rate=1e-5,
        betas=(0.9, 0.999),
        eps=1e-10,
        weight_decay=0.0,
        clip_norm=0.5,
        warmup_steps=0,
        schedule="constant",
    )
    return config
