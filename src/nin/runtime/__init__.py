"""Devices, processes, CUDA graphs, timers and files: what all other packages use."""
