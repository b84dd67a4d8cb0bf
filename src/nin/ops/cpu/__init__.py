"""The compiled kernels of ``nin::mlpconv`` for the CPU."""
