"""How a task is measured: what a benchmark consists of, the check against ours, timing, memory, provenance."""
