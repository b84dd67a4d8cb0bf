"""The 1×1 chains of any PyTorch model become the operator `nin::mlpconv`."""

from nin.fusion.chain import FORMS, Chain
from nin.fusion.rewrite import Fused, FusedChain, fuse

__all__ = ["FORMS", "Chain", "Fused", "FusedChain", "fuse"]
