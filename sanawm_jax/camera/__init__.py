"""Camera control: key strings, pose files, intrinsics, and the rays that the networks read.

Everything here is NumPy on the host. Axes are those of OpenCV (+X right, +Y down, +Z forward), and
matrices are camera-to-world, `[R t; 0 0 0 1]`.

| module | content |
| --- | --- |
| `actions` | from strings such as "w-40,dw-20" to camera paths |
| `mapping`, `live` | what the keys do, and held keys to poses a few frames at a time |
| `poses` | `.npy` paths, checks, poses relative to the first frame, frame counts |
| `track` | `PoseTrack`, the camera of one video |
| `pose_files`, `reconstructions` | paths in the formats npz, TUM, KITTI, COLMAP and nerfstudio |
| `intrinsics` | focal lengths and principal point, fields of view, cropping |
| `rays` | the two camera inputs of stage 1: pose tokens and Plücker maps |
| `npy` | safe reading of `.npy` files |
"""
