"""The small world's scenes and their renderer.

| module | what it holds |
| --- | --- |
| `scene` | `Scene`, fixed-size arrays; tables of bodies, paints, lights |
| `shapes` | ray intersections and distances of the bodies |
| `light` | soft shadows and ambient occlusion, both closed formulas |
| `textures` | patterns and noise that fade before they are too fine for a pixel |
| `tiles`, `shading`, `render` | bodies per tile, colour of rays, pictures and depth, in batches |
| `palette`, `builder`, `things`, `places` | how a seed becomes a scene |
| `paths`, `captions`, `clip` | camera paths, texts of what is in sight, whole clips |

Only `light`, `textures`, `tiles`, `shading` and `render` import jax.
"""
