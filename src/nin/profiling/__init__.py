"""Profiling: MACs, parameters, memory and time of networks, and benchmarks beside other engines."""
