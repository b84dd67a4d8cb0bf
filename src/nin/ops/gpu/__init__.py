"""The Triton kernels of ``nin::mlpconv`` for NVIDIA GPUs."""
