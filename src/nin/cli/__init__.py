"""The command line: one module for each verb.

To import a verb's module takes no PyTorch, so that its help and an error of its arguments come at once: its functions
import what they need, or use the public names of ``nin``, which are loaded when they are first used.
"""
