#!/usr/bin/env bash
# Makes a virtual environment with the package, its driver and its tools: scripts/setup.sh VENV [PYTHON].
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/setup.sh VENV [PYTHON]}
python=${2:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "setup: Python 3.10 or newer is needed; name one with PYTHON=..." >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "setup: this Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
fi
echo "setup: making $venv (a few minutes; on a GPU machine torch alone is gigabytes)"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --upgrade pip "setuptools>=77" wheel

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    pip install --quiet torch torchvision
else
    # The newest build brings gigabytes of CUDA; this version has a CPU build.
    pip install --quiet torch==2.13.0
    if ! "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
        echo "setup: the package index gave a CUDA build of torch 2.13.0; it works, and is larger than needed here" >&2
    fi
fi
echo "setup: torch is there; now the package, its driver and its tools"
# No dependency may replace that torch: another one would bring gigabytes, or not fit the GPU's driver.
torch=$("$venv/bin/python" -c 'import torch; print(torch.__version__.partition("+")[0])')
# DeepSpeed's build looks at the installed torch, so it is built without isolation.
pip install --quiet --no-build-isolation --editable '.[dev]' "torch==$torch"
