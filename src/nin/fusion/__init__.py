"""Fusing: the 1×1 chains of any PyTorch model become the operator `nin::mlpconv`."""

from nin.fusion.chain import CHAIN_FORMS, Chain
from nin.fusion.rewrite import FusedChain, FuseResult, fuse

__all__ = ["CHAIN_FORMS", "Chain", "FuseResult", "FusedChain", "fuse"]
