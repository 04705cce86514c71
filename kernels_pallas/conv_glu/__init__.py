"""Bias, SiLU, depthwise 3x3 convolution and SiLU gate in one pass over the data."""

from kernels_pallas.conv_glu.api import conv_glu
from kernels_pallas.conv_glu.gpu import Tiles
from kernels_pallas.conv_glu.reference import depthwise_conv

__all__ = ["Tiles", "conv_glu", "depthwise_conv"]
