"""Lists the packages; everything else about them is in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["sanawm_jax*", "kernels_pallas*"]),
        # the top-level folder would collide with other projects' `configs`
        "sanawm_jax.configs",
    ],
    package_dir={"sanawm_jax.configs": "configs"},
)
