"""Images and videos on the host: reading, cropping, writing, and the control overlay.

| module | content |
| --- | --- |
| `image` | the first frame: it is loaded, resized, cropped and scaled to [-1, 1] |
| `video`, `video_reader` | writers for MP4 and GIF; a reader that shows videos as players do |
| `overlay` | key caps and a map of the path, drawn on the frames |
"""
