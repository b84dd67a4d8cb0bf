"""Devices, processes, CUDA graphs, timers, files, and text formats: what all other packages use, and no networks."""
