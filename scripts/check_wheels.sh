#!/usr/bin/env bash
# Builds sdist and wheel, and installs each in an empty virtual environment, with and without a compiler:
# scripts/check_wheels.sh [VENV], where VENV (.venv) has the extra `dev`. Results in build/wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "${1:-.venv}")
python=$venv/bin/python
work=$PWD/build/wheels
# What the README says; torch's own wheels run from 2.28 on.
newest_glibc=2.24
export PATH="$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONNOUSERSITE=1
unset PYTHONPATH VGPO_CPU_CAPABILITY
rm -rf "$work"
mkdir -p "$work"

say() { echo "check_wheels: $*"; }
fail() { say "FAILED: $*" >&2; exit 1; }
# quietly LOG COMMAND...: shows what it wrote only where it fails.
quietly() { "${@:2}" >"$work/$1.log" 2>&1 || { tail -60 "$work/$1.log"; fail "$1"; }; }

say "building"
# From the sdist alone, as on another machine.
quietly sdist "$python" -m build --no-isolation --sdist --outdir "$work/sdist" .
sdist=$(echo "$work"/sdist/vgpo_kernels-*.tar.gz)
mkdir "$work/source"
tar -xzf "$sdist" --strip-components 1 -C "$work/source"
quietly wheel "$python" -m build --no-isolation --wheel --outdir "$work/wheel" "$work/source"
wheel=$(echo "$work"/wheel/vgpo_kernels-*-cp310-abi3-linux_*.whl)
test -f "$wheel" || fail "no cp310-abi3 wheel, but $(ls "$work/wheel")"

for name in LICENSE README.md setup.py csrc/view.h csrc/module.cpp; do
    test -f "$work/source/$name" || fail "the sdist lacks $name"
done
"$python" -m zipfile --list "$wheel" | awk 'NR > 1 {print $1}' >"$work/names"
grep -q '^vgpo_kernels/_csrc\.abi3\.so$' "$work/names" || fail "the wheel lacks the extension"
grep -q 'licenses/LICENSE$' "$work/names" || fail "the wheel lacks the licence"
if grep -E '\.(cpp|h|o)$|^(csrc|tests|build|benchmarks)/' "$work/names"; then
    fail "the wheel has what only a build needs"
fi

say "auditing"
quietly abi3audit "$python" -m abi3audit --strict --verbose "$wheel"
"$python" -m auditwheel show "$wheel"
quietly repair "$python" -m auditwheel repair --wheel-dir "$work/repaired" "$wheel"
repaired=$(echo "$work"/repaired/vgpo_kernels-*.whl)
glibc=$(basename "$repaired" | grep -o 'manylinux_2_[0-9]*' | sort -V | head -1 | sed 's/manylinux_2_/2./')
test "$(printf '%s\n' "$glibc" "$newest_glibc" | sort -V | tail -1)" = "$newest_glibc" ||
    fail "needs glibc $glibc, and the README says $newest_glibc"
say "$(basename "$repaired") runs from glibc $glibc on"

# Everything but torch and what torch needs is left out; these are seen through a file of paths.
make_empty() {
    "$python" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --no-index --no-deps "$(echo "$work"/tools/setuptools-*.whl)"
    "$python" - "$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PY'
import importlib.metadata, pathlib, re, sys

site, seen, todo = pathlib.Path(sys.argv[1]), set(), ["torch"]
while todo:
    name = todo.pop()
    if name in seen:
        continue
    seen.add(name)
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    todo += [re.match(r"[\w.-]+", need)[0] for need in found.requires or () if "extra ==" not in need]
    for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / top).exists():
            (site / top).symlink_to(found.locate_file(top))
PY
}
mkdir "$work/tools"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/tools" "setuptools>=77"

# Away from the sources: what is imported is what was installed.
smoke() {
    (cd "$work" && env "${@:3}" "$1/bin/python" "$work/smoke.py" "$2" "$1") || fail "$2 expected in $1"
}
cat >"$work/smoke.py" <<'PY'
"""What an installation does: smoke.py native|reference ENVIRONMENT."""

import pathlib
import subprocess
import sys

import torch

import vgpo_kernels

wanted, environment = sys.argv[1:]
place = pathlib.Path(vgpo_kernels.__file__)
assert place.is_relative_to(environment), f"imported from {place}"
report = subprocess.run([sys.executable, "-m", "vgpo_kernels", "doctor"], capture_output=True, text=True)
assert report.returncode == 0, report.stderr
rows = [line.split() for line in report.stdout.splitlines()]
assert any(row[:3] == ["visual_focus_score", "cpu", wanted] for row in rows), report.stdout

states = torch.randn(2, 12, 8)
visual = torch.zeros(2, 12, dtype=torch.bool)
visual[:, 1:4] = True
completion = torch.zeros_like(visual)
completion[:, 6:] = True
score = vgpo_kernels.visual_focus_score
expected = score(states, visual, completion, impl="reference")
remedy = "--force-reinstall"
if wanted == "native":
    torch.testing.assert_close(score(states, visual, completion, impl="native"), expected)
    left, right, out = torch.randn(40, 30), torch.randn(30, 50), torch.empty(40, 50)
    vgpo_kernels._native.call("product", out, left, right, False)
    torch.testing.assert_close(out, left @ right)
    assert remedy not in report.stdout, report.stdout
else:
    assert "g++" in report.stdout and remedy in report.stdout, report.stdout
    assert torch.equal(score(states, visual, completion), expected)
    try:
        score(states, visual, completion, impl="native")
    except RuntimeError as error:
        assert "g++" in str(error) and remedy in str(error), error
    else:
        raise AssertionError("impl='native' ran without the extension")
print(f"smoke: {wanted}, as expected, from {place}")
PY

install() { "$1/bin/python" -m pip install --quiet --no-index "${@:2}"; }

say "the wheel in an empty environment"
make_empty "$work/from-wheel"
install "$work/from-wheel" "$repaired"
smoke "$work/from-wheel" native

say "the sdist, without a compiler"
make_empty "$work/from-sdist"
cache=$work/cache
CC=/nonexistent/cc CXX=/nonexistent/c++ install "$work/from-sdist" --no-build-isolation --cache-dir "$cache" "$sdist"
smoke "$work/from-sdist" reference

say "its remedy, with a compiler"
install "$work/from-sdist" --no-build-isolation --cache-dir "$cache" --force-reinstall --no-deps --no-cache-dir "$sdist"
smoke "$work/from-sdist" native

# Other Pythons have no torch here, and the extension needs none: the module itself.
say "the extension under other Pythons"
mkdir "$work/alone"
"$python" -m zipfile --extract "$repaired" "$work/alone"
cat >"$work/alone.py" <<'PY'
import array, importlib.machinery, importlib.util, sys

loader = importlib.machinery.ExtensionFileLoader("_csrc", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_csrc", loader))
loader.exec_module(module)
numbers = array.array("f", [2.0, 1.0, -1.0])
out = array.array("f", [9.0])
one, row, column = ((0, *sizes, 1, 1) for sizes in ((1, 1), (1, 3), (3, 1)))
address = numbers.buffer_info()[0]
module.product((out.buffer_info()[0], *one), (address, *row), (address, *column), 0, 1)
assert out[0] == 6.0, list(out)
try:
    module.product((out.buffer_info()[0], *one), (address, *row), (address, *row), 0, 1)
except ValueError:
    print(f"alone: Python {sys.version.split()[0]}, {module.capability()}")
else:
    raise AssertionError("no ValueError for a wrong size")
PY
for other in python3.10 python3.11 python3.12 python3.13 python3.14 "$HOME"/.pyenv/versions/3.1[0-9].*/bin/python; do
    "$other" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    (cd "$work" && "$other" -I "$work/alone.py" "$work/alone/vgpo_kernels/_csrc.abi3.so") || fail "$other"
done
say "all well"
