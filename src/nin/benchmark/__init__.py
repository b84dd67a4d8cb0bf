"""Times this package's kernels beside other engines: same weights, same run, in turn."""

from nin.benchmark.cases import CASES, Case
from nin.benchmark.report import chart, table
from nin.benchmark.runner import Benchmark, Machine, Measurement, run

__all__ = ["CASES", "Benchmark", "Case", "Machine", "Measurement", "chart", "run", "table"]
