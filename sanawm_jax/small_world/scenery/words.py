"""Caption words whose order the scenes store as indices."""

from __future__ import annotations

KINDS = (
    *("house", "cabin", "hut", "tower", "church", "lighthouse", "pagoda", "pavilion", "well"),
    *("gate", "column", "obelisk", "pyramid", "arch", "statue", "wall", "fence", "hedge"),
    *("tree", "pine", "palm", "bush", "rock", "hill", "snowman", "cactus", "flower"),
    *("lantern", "bench", "crate", "barrel", "boat", "umbrella", "bridge", "pond", "sea", "path"),
    *("table", "sofa", "shelf", "bed", "lamp", "stool", "plant", "vase", "ball", "picture", "rug"),
)
PLURALS = {"shelf": "shelves", "church": "churches", "bush": "bushes", "bench": "benches"}
PLURALS |= {"arch": "arches", "cactus": "cacti", "sea": "seas", "box": "boxes"}
SKY_NAMES = ("clear", "cloudy", "golden", "pink", "turquoise", "dusk", "gray")
