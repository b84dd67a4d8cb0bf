"""The CPU backend of ``nin::mlpconv``: kernels compiled from C++, their dispatch and what they need."""
