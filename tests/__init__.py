"""The tests; `tools` is shared with the benchmarks."""
