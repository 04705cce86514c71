"""SANA-WM in JAX: one image, a prompt and a camera path become a video."""

__version__ = "0.1.0.dev0"
