"""Camera control: key strings, pose files, intrinsics and the rays the networks read.

Everything here is numpy on the host, in OpenCV axes (+X right, +Y down, +Z forward), with
camera-to-world matrices `[R t; 0 0 0 1]`.

| module | what it holds |
| --- | --- |
| `actions` | "w-40,dw-20" to a camera path |
| `poses` | `.npy` paths, checks, poses relative to the first frame, frame counts |
| `track` | `PoseTrack`, the camera of one video |
| `pose_files`, `reconstructions` | paths in npz, TUM, KITTI, COLMAP and nerfstudio layout |
| `intrinsics` | focal lengths and principal point, fields of view, cropping |
| `rays` | the two camera inputs of stage 1: pose tokens and Plücker maps |
| `npy` | safe reading of `.npy` files |
"""
