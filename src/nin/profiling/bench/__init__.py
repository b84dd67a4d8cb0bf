"""Times this package's kernels beside other engines: same weights, same run, in turn."""

from nin.profiling.bench.cases import CASES, Case
from nin.profiling.bench.report import chart, table
from nin.profiling.bench.runner import Benchmark, Machine, Measurement, run

__all__ = ["CASES", "Benchmark", "Case", "Machine", "Measurement", "chart", "run", "table"]
