"""The stages of a world model's pre-training. Each stage starts with the weights of the last one.

    python train.py --config=configs/curriculum.py:gdn_5s --workdir=A --config.data_dir=LATENTS
    python train.py --config=configs/curriculum.py:hybrid_5s --workdir=B --config.data_dir=LATENTS
        --config.init_weights=A_FOLDER
    python train.py --config=configs/curriculum.py:minute_camera --workdir=C ...
    python train.py --config=configs/curriculum.py:sft --workdir=D ...

`A_FOLDER` is a stage-1 folder whose transformer/ is A/export/transformer.

NVlabs/Sana publishes the network, the 961 frames at 16 frames per second of the final stage, that
the data are partly without cameras, the total of 15 days on 64 H100, and the optimizer of the later
chunk-causal fine-tuning, which all stages use here. It does not publish the clip length of the
first stages (81 frames here), the numbers of steps, the learning rates, the batch sizes, the
mixture of the data, and the data of the last stage. These values are our own.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import stage1_bidirectional

# Fields that differ from `stage1_bidirectional`.
_STAGES: dict[str, dict] = {
    # Five seconds: 81 pixel frames are 11 latent frames. All layers are recurrent; no camera.
    "gdn_5s": {"use_camera": False, "dit.softmax_every_n": 0},
    # Every fourth layer becomes a softmax layer, and starts with the recurrent layer's weights.
    "hybrid_5s": {"use_camera": False, "dit.softmax_every_n": 4},
    "minute_camera": {},
    # Fine-tuning on selected clips.
    "sft": {"steps": 5_000, "save_every": 50},
}


def get_config(stage: str = "minute_camera") -> ConfigDict:
    """Returns the configuration of a stage: gdn_5s, hybrid_5s, minute_camera or sft."""
    if stage not in _STAGES:
        raise ValueError(f"no stage {stage!r}; use one of {', '.join(_STAGES)}")
    config = stage1_bidirectional.get_config()
    config.dit.softmax_every_n = 4
    if stage.endswith("_5s"):
        config.synthetic.latent_frames = 11
        config.mesh.update(fsdp=8, context=1)
        config.batch_size = 8
    config.update_from_flattened_dict(_STAGES[stage])
    return config
