"""The code for sm_90: one loop of warp-group products that run on while 16-byte copies bring the next tiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
CASES = [f"linear logprobs {name}" for name in ("bf16", "bf16 entropy", "bf16 entropy softcap bias", "fp16 bias")]


def test_the_matrix_loop_never_waits_for_its_own_product() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(HERE.parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, HERE / "linear_listing.py", *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == CASES
    for name, counts in report.items():
        # Two halves of 64 x 128 a warp group, four steps of 16 in the width.
        assert counts["wgmma"] == counts["products"] == 8, name
        assert counts["mma"] == 0, name
        # An assembler that finds the accumulators touched in flight ends a group, and waits, after every product.
        assert counts["groups"] == 1, name
        # 12 copies of 16 bytes a thread bring a tile of each side: three tiles ahead of the loop, one in it.
        assert counts["copies"] == 48, name
