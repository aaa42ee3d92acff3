"""The code for sm_90: matrix products of warp groups, fed by asynchronous copies of 16 bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
CASES = [
    *(f"attention forward bf16 D {D}" for D in (64, 128, 256)),
    *(f"attention {name}" for name in ("dkdv bf16 D 64", "dkdv bf16 D 128", "dk bf16 D 256", "dv bf16 D 256")),
    *(f"attention dq bf16 D {D}" for D in (64, 128, 256)),
]


BARRIERS = """
from dataclasses import replace
from compiled_loops import listing
from vgpo_kernels.attention.triton.decode import compile_cases
case = next(case for case in compile_cases() if case.name == "attention split bf16 D 128 rows 7")
kinds = (replace(case, constexprs=case.constexprs | {"ONE_QUERY": one}) for one in (True, False))
print([listing(kind).count("bar.sync") for kind in kinds])
"""


def compiling(*command: object) -> object:
    """Returns what a process where Triton compiles prints as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(HERE.parents[1]), str(HERE), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_query_of_decode_waits_for_a_reduction_less():
    one, several = compiling("-c", BARRIERS)
    assert one < several


def test_every_matrix_loop_uses_the_tensor_cores_of_warp_groups():
    report = compiling(HERE / "compiled_loops.py", *CASES)
    assert list(report) == CASES
    for name, (wgmma, mma, copies) in report.items():
        assert wgmma > 0, name
        assert mma == 0, name
        # Two tensors, in the loop of whole tiles and in the other, before it and in it.
        assert copies >= 8, name
