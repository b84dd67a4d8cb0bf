"""The engines that compute a network: which there are, what installs them, and how a file is loaded in each.

This file imports nothing: processes that run one engine have the memory of that engine alone.
"""
