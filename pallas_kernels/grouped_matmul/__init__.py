"""Rows times their expert's matrices: the fused SwiGLU of a mixture of experts."""

from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_swiglu

__all__ = ["IMPLEMENTATIONS", "grouped_swiglu"]
