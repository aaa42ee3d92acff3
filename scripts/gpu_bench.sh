#!/usr/bin/env bash
# Everything worth doing when a GPU is at hand for half an hour, in order of value: scripts/gpu_bench.sh OUTDIR.
# Tests of the kernels, the benchmarks' small cases and the paper's, candidates of tiles, then a look into the worst
# kernel. The steps share BUDGET_SECONDS (1680); one that fails or runs out of time does not stop the next, and the exit
# code says whether any did. Takes the torch and triton of PYTHON (python3) as they are, and no network.
# GPU_BENCH_CPU=1 runs it without a GPU, on a few tests and the smallest sizes, to try the script itself.
set -uo pipefail
[[ $# = 1 ]] || { echo "usage: scripts/gpu_bench.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(realpath "$1")
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
deadline=$((SECONDS + ${BUDGET_SECONDS:-1680}))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET VGPO_BENCH_IMPL

tests=(tests/attention tests/focus tests/weights tests/policy_loss)
# The benchmarks look for the tests' record in the checkout, which a trial leaves alone.
record=.tests.json benchmarks=benchmarks cases=(small paper)
tune=()
"$python" -c 'import importlib.util as i, sys; sys.exit(0 if i.find_spec("torch") else 3)'
[[ $? != 3 ]] || { echo "gpu_bench: $python has no torch; PYTHON names another" >&2; exit 2; }
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    if [[ ${GPU_BENCH_CPU:-} != 1 ]]; then
        echo "gpu_bench: $python finds no GPU with torch; GPU_BENCH_CPU=1 tries the script on the CPU" >&2
        exit 2
    fi
    tests=(tests/weights/test_weights_config.py)
    record=$out/tests.json benchmarks=benchmarks/test_bench_weights.py cases=(tiny tiny)
    tune=(--compile-only --kernel "weights group" --target sm_90)
fi
workers=$(($(nproc) / 2 < 8 ? $(nproc) / 2 : 8))
parallel=()
if ((workers > 1)) && "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n "$workers"); fi
# An interrupted pytest writes what it has; but a script started in the background hands down deaf ears.
listening=()
if env --default-signal=INT true 2>/dev/null; then listening=(env --default-signal=INT); fi

log=$out/log.txt summary=$out/summary.txt failures=0
# What an earlier run left here must not pass for this one's.
rm -f "$out"/{tests,small,paper,tune}.json "$out/worst.ncu-rep"
: >"$log"
printf '%-8s %8s %8s  %s\n' step seconds limit result | tee "$summary"

# step NAME SHARE COMMAND...: runs it in at most SHARE percent of the time that is left.
step() {
    local name=$1 limit=$(((deadline - SECONDS) * $2 / 100)) start=$SECONDS status=0 result=well
    printf '\n==> %s: %s\n' "$name" "${*:3}" >>"$log"
    if ((limit < 1)); then
        status=1 result="not begun: no time left"
    else
        timeout --signal=INT --kill-after=15 "$limit" ${listening[@]+"${listening[@]}"} "${@:3}" >>"$log" 2>&1
        status=$?
        case $status in
            0) ;;
            124 | 137) result="out of time" ;;
            *) result="failed ($status): $(tail -n 1 "$log")" ;;
        esac
    fi
    ((status == 0)) || failures=$((failures + 1))
    printf '%-8s %8d %8d  %s\n' "$name" $((SECONDS - start)) "$limit" "$result" | tee -a "$summary"
}

pytest=("$python" -m pytest -q -p no:cacheprovider)
step tests 35 "${pytest[@]}" "${tests[@]}" ${parallel[@]+"${parallel[@]}"} --record "$record"
[[ $record -ef $out/tests.json || ! -f $record ]] || cp "$record" "$out/tests.json"
step small 40 "${pytest[@]}" "$benchmarks" --benchmark-only --cases "${cases[0]}" --benchmark-json "$out/small.json"
step paper 60 "${pytest[@]}" "$benchmarks" --benchmark-only --cases "${cases[1]}" --benchmark-json "$out/paper.json"
step tune 75 "$python" benchmarks/tune.py ${tune[@]+"${tune[@]}"} --json "$out/tune.json"
step worst 100 "$python" benchmarks/worst.py "$out"
echo "$failures of 5 steps failed" | tee -a "$summary"
exit $((failures > 0))
