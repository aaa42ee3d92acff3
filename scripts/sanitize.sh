#!/usr/bin/env bash
# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, and their self-check under
# ThreadSanitizer: scripts/sanitize.sh [VENV] [pytest's arguments]. Results in build/sanitized.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "${1:-.venv}")
python=$venv/bin/python
work=$PWD/build/sanitized
unset PYTHONPATH VGPO_CPU_CAPABILITY
fail() { echo "sanitize: FAILED: $*" >&2; exit 1; }

rm -rf "$work"
mkdir -p "$work/objects" "$work/threads"
cp -r vgpo_kernels "$work/vgpo_kernels"
rm -f "$work"/vgpo_kernels/_csrc.*

# As setup.py compiles, but for what the sanitizers need.
mapfile -t flags < <(sed -n '/extra_compile_args/,/\]/p' setup.py | grep -o '"-[^"]*"' | tr -d '"' | grep -v '^-[Og]')
include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
sanitizers=(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g)
echo "sanitize: building"
printf '%s\n' csrc/*.cpp | xargs -P 2 -I{} bash -c \
    'g++ "${@:3}" -c "$1" -o "$2/$(basename "$1").o"' _ {} "$work/objects" "${flags[@]}" "${sanitizers[@]}" \
    -fPIC "-I$include"
g++ -shared "${sanitizers[@]}" "$work"/objects/*.o -o "$work/vgpo_kernels/_csrc.abi3.so"

# Python is built without the sanitizers, so they are loaded before it, and libstdc++ for C++'s exceptions.
libraries=$(for name in asan ubsan stdc++; do realpath "$(g++ -print-file-name=lib$name.so)"; done | paste -sd:)
sanitized() {
    env LD_PRELOAD="$libraries" PYTHONPATH="$work" PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
        ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1 \
        UBSAN_OPTIONS=print_stacktrace=1 "$@"
}

# The sanitizer must be on, and instrument what torch and Python allocate: a wrong size in a call has to be caught.
cat >"$work/sizes.py" <<'PY'
import sys

import torch

from vgpo_kernels import _csrc

if sys.argv[1] != _csrc.__file__:
    sys.exit(f"the extension came from {_csrc.__file__}")
out, left, right = torch.zeros(1, 24), torch.zeros(1, 24), torch.zeros(24, 24)
size = 24 if sys.argv[2] == "right" else 32
row = 0, 1, size, size, 1
_csrc.product((out.data_ptr(), *row), (left.data_ptr(), *row), (right.data_ptr(), 0, size, size, size, 1), 0, 1)
PY
extension=$work/vgpo_kernels/_csrc.abi3.so
call() { (cd "$work" && sanitized "$python" sizes.py "$extension" "$1") >"$work/$1.log" 2>&1; }
call right || fail "a call with the right size: $(cat "$work/right.log")"
call wrong && fail "a read out of bounds was not caught"
grep -q 'SUMMARY: AddressSanitizer: .* in vgpo::' "$work/wrong.log" || fail "a wrong size: $(cat "$work/wrong.log")"
echo "sanitize: a read out of bounds is caught; now the tests"

mapfile -t tests < <(find tests -name 'test_*native*.py' | sort)
test "${#tests[@]}" -gt 0 || fail "no tests of the CPU kernels"
# A process a file, two at a time. Not `python -m pytest`: that puts the folder of the sources first.
export -f sanitized
export work libraries
printf '%s\n' "${tests[@]}" | xargs -P 2 -I{} bash -c '
    log=$work/$(basename "$1").log
    sanitized CI=true "$2/bin/pytest" -x -q -p no:cacheprovider --timeout 900 "$1" "${@:3}" >"$log" 2>&1
    status=$?
    ((status == 0)) || cat "$log"
    echo "sanitize: $1: $(tail -n 1 "$log")"
    exit $((status != 0))' _ {} "$venv" "${@:2}" || fail "tests"

echo "sanitize: threads"
printf '%s\n' csrc/{parallel,target_*}.cpp tests/csrc/*.cpp | xargs -P 2 -I{} bash -c \
    'g++ "${@:3}" -c "$1" -o "$2/$(basename "$1").o"' _ {} "$work/threads" "${flags[@]}" -fsanitize=thread -O1 -g
g++ -pthread -fsanitize=thread "$work"/threads/*.o -o "$work/selfcheck"
"$work/selfcheck" || fail "the kernels' self-check under ThreadSanitizer"
echo "sanitize: all well"
