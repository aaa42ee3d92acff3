"""Times every kernel beside its peers: `pytest benchmarks/ --benchmark-only`, then `python -m benchmarks.report FILE`.

`tasks` holds what is measured, `peers` what it is measured against, `harness` how; `results` has a file a machine.
"""
