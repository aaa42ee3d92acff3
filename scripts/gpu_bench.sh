#!/usr/bin/env bash
# All checks and timings for a GPU, by stages that each end within nine minutes: scripts/gpu_bench.sh OUT [STAGE...]
# Stages: smoke, tests, small, tiles, peers, paper, worst; STAGE/STEP is one of its steps, as small/mass. Without a stage
# all of them run in this order, as far as BUDGET_SECONDS (540) goes. EARLIER names folders with earlier calls' files,
# a colon between two. Takes torch and Triton of PYTHON (python3) as they are; needs neither git nor a network, and of
# packages pytest, pytest-benchmark, numpy and psutil. VGPO_COMMIT names the commit of a copy without .git.
# GPU_BENCH_CPU=1 tries the script without a GPU.
set -uo pipefail
[[ $# -ge 1 ]] || { echo "usage: scripts/gpu_bench.sh OUT [STAGE...]" >&2; exit 2; }
mkdir -p "$1" || exit 2
root=$(realpath "$(dirname "$0")/..") || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET VGPO_BENCH_IMPL
exec "${PYTHON:-python3}" "$root/benchmarks/gpu_bench.py" "$@"
