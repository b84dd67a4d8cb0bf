"""Fusing: 1×1 chains and inverted bottlenecks of any PyTorch model become one operator each."""

from nin.fusion.chain import CHAIN_FORMS, Chain
from nin.fusion.compiled import CompiledNetwork
from nin.fusion.rewrite import FusedChain, FuseResult, fuse

__all__ = ["CHAIN_FORMS", "Chain", "CompiledNetwork", "FuseResult", "FusedChain", "fuse"]
