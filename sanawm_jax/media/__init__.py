"""Pictures and films on the host: reading, cropping, writing, and the control overlay.

| module | what it holds |
| --- | --- |
| `image` | the first frame: load, resize and crop, to [-1, 1] |
| `video` | MP4 and GIF writers, an MP4 reader |
| `overlay` | key caps and a map of the path, drawn on the frames |
"""
