"""The benchmark `nin bench`: nin's kernels beside other engines, with the same weights, in turn in one run."""

from nin.profiling.bench.cases import CASES, Case
from nin.profiling.bench.report import html_page, rich_table
from nin.profiling.bench.runner import Benchmark, EngineResult, Machine, run

__all__ = ["CASES", "Benchmark", "Case", "EngineResult", "Machine", "html_page", "rich_table", "run"]
