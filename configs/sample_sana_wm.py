"""Sampling defaults of the released model, 704x1280.

    python sample.py --config=configs/sample_sana_wm.py --weights DIR --image IMAGE --prompt TEXT \
        --action "w-80,dw-40,w-40"
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.weights = "Efficient-Large-Model/SANA-WM_bidirectional-diffusers"
    config.refiner_weights = ""  # "": the result of stage 1 is decoded without refinement
    config.image = ""
    config.prompt = ""
    config.negative_prompt = ""
    config.action = ""
    config.action_mapping = "sana"
    config.intrinsics = ""
    config.num_frames = 161
    config.height = 704
    config.width = 1280
    config.fps = 16
    config.step = 60
    config.cfg_scale = 5.0
    config.flow_shift = 0.0  # 0: the value of the scheduler's configuration
    config.text_length = 300
    config.seed = 42
    config.sink_size = 1
    config.refiner_block_size = 3
    config.refiner_kv_max_frames = 11
    config.refiner_seed = 42
    config.dtype = "bfloat16"
    config.precision = "bf16"
    config.offload = "none"
    config.devices = 1
    # none; always: tiles of 512x512 pixels and 96 frames; auto: tiles if the video is larger
    config.vae_tiling = "auto"
    return config
