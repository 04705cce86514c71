"""The stages of a world model's pre-training, each of which starts from the one before.

    python train.py --config=configs/curriculum.py:gdn_5s --workdir=A --config.data_dir=LATENTS
    python train.py --config=configs/curriculum.py:hybrid_5s --workdir=B --config.data_dir=LATENTS
        --config.init_weights=A_FOLDER
    python train.py --config=configs/curriculum.py:minute_camera --workdir=C ...
    python train.py --config=configs/curriculum.py:sft --workdir=D ...

`A_FOLDER` is a stage-1 folder whose transformer/ is A/export/transformer.

Found in what NVlabs/Sana publishes: the network, 16 frames a second and 961 frames of the final
stage, data without cameras in the mix, 15 days on 64 H100 in all, and the optimizer of the later
chunk-causal fine-tune, which every stage has here. Not found, and ours: the order's clip length of
81 frames, steps, rates, batch sizes, the mix of data, and what the last stage's data are.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import stage1_bidirectional

# lines that differ from `stage1_bidirectional`
_STAGES: dict[str, dict] = {
    # five seconds: 81 frames are 11 latents. The recurrence alone, and no poses
    "gdn_5s": {"use_camera": False, "dit.softmax_every_n": 0},
    # every fourth layer becomes softmax attention, with the recurrent layer's own weights
    "hybrid_5s": {"use_camera": False, "dit.softmax_every_n": 4},
    "minute_camera": {},
    # chosen clips
    "sft": {"steps": 5_000, "save_every": 50},
}


def get_config(stage: str = "minute_camera") -> ConfigDict:
    """One stage: gdn_5s, hybrid_5s, minute_camera or sft."""
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
