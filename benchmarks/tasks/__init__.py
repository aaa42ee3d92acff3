"""The benchmarks: a module for each task or some, with its cases, inputs, providers and counted work."""
