#!/usr/bin/env bash
# Compiles the CPU kernels for every target with warnings as errors and runs a self-check of them, with g++ and
# clang++ here and for aarch64 under qemu: scripts/check_targets.sh [VENV]. Says what it skips. Results in
# build/targets. As root it installs what lacks, unless VGPO_NO_INSTALL is set.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "${1:-.venv}")
work=build/targets
skipped=()
fail() { echo "check_targets: FAILED: $*" >&2; exit 1; }

rm -rf "$work"
mkdir -p "$work"
if [[ $(id -u) = 0 && -z ${VGPO_NO_INSTALL:-} ]] && command -v apt-get >/dev/null; then
    missing=()
    command -v clang++ >/dev/null || missing+=(clang)
    command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
    command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
    if ((${#missing[@]})); then
        echo "check_targets: installing ${missing[*]}"
        { timeout 60 apt-get update -q && timeout 180 apt-get install -y -q --no-install-recommends "${missing[@]}"; } \
            >"$work/apt.log" 2>&1 || echo "check_targets: could not install ${missing[*]}"
    fi
fi

# As setup.py compiles; with clang++, which is not what wheels are made with, for less time.
mapfile -t flags < <(sed -n '/extra_compile_args/,/\]/p' setup.py | grep -o '"-[^"]*"' | tr -d '"')
include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')

# compile NAME COMPILER FILE...: objects of the files in $work/NAME, two at a time.
compile() {
    mkdir -p "$work/$1"
    printf '%s\n' "${@:3}" | xargs -P 2 -I{} bash -c \
        '"$2" "${@:4}" -Werror -c "$1" -o "$3/$(basename "$1" .cpp).o"' _ {} "$2" "$work/$1" "${flags[@]}" \
        $([[ $1 = clang++ ]] && echo -O1) -fPIC "-I$include"
}

# What is not in a target's own namespace is shared by all, whichever copy the linker keeps: it must not be compiled
# for that target's processors.
check_shared_code() {
    local target=$1 object=$2 found
    found=$(objdump -d --no-show-raw-insn "$object" | awk -v space="4vgpo${#target}$target" '
        /^[0-9a-f]+ </ {name = $0; own = index($0, space)}
        /%[yz]mm|\tv[a-z]/ {if (own) good = 1; else {print name ": " $0 > "/dev/stderr"; bad = 1}}
        END {print (bad ? "leaks" : good ? "sound" : "unseen")}')
    test "$found" = sound || fail "$object: $found: code outside vgpo::$target:: uses its instructions, or none does"
}

for compiler in g++ clang++; do
    if ! command -v "$compiler" >/dev/null; then
        skipped+=("$compiler: not installed")
        continue
    fi
    echo "check_targets: $compiler"
    compile "$compiler" "$compiler" csrc/*.cpp tests/csrc/*.cpp
    if [[ $(uname -m) = x86_64 ]]; then
        for target in avx2 avx512; do check_shared_code "$target" "$work/$compiler/target_$target.o"; done
    fi
    "$compiler" -shared -o "$work/$compiler/_csrc.so" "$work/$compiler"/{module,parallel,target_*}.o
    "$compiler" -pthread -o "$work/$compiler/selfcheck" "$work/$compiler"/{parallel,target_*,selfcheck,elementwise}.o
    "$work/$compiler/selfcheck" || fail "the self-check of $compiler"
done

if command -v aarch64-linux-gnu-g++ >/dev/null; then
    echo "check_targets: aarch64"
    compile aarch64 aarch64-linux-gnu-g++ csrc/{parallel,target_*}.cpp tests/csrc/*.cpp
    aarch64-linux-gnu-g++ "${flags[@]}" -Werror -fsyntax-only "-I$include" csrc/module.cpp
    aarch64-linux-gnu-g++ -static -pthread -o "$work/aarch64/selfcheck" "$work"/aarch64/*.o
    if command -v qemu-aarch64 >/dev/null; then
        qemu-aarch64 "$work/aarch64/selfcheck" || fail "the self-check on aarch64"
    else
        skipped+=("running on aarch64: no qemu-aarch64")
    fi
else
    skipped+=("aarch64: no aarch64-linux-gnu-g++")
fi

for what in ${skipped[@]+"${skipped[@]}"}; do echo "check_targets: SKIPPED $what" >&2; done
echo "check_targets: all that could be checked is well"
