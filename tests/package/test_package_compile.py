"""`python -m vgpo_kernels compile`, for real: Triton compiles without a GPU."""

import json

import pytest
from package_launch import HERE, python

from vgpo_kernels import _compile

_triton = pytest.importorskip("vgpo_kernels._triton", reason="needs Triton")

FAILING = HERE / "failing_kernels.py"


def table(output: str) -> dict[tuple[str, str], list[str]]:
    """Returns registers, stack, spilled, shared and verdict by kernel and target."""
    lines = [line for line in output.splitlines() if line.endswith("ok") or "FAILS" in line]
    rows = {}
    for line in lines:
        kernel, target, *cells = line.replace("FAILS: ", "FAILS:").split(None, 6)
        rows[kernel, target] = cells
    return rows


def test_one_kernel_for_two_targets(tmp_path):
    report = tmp_path / "rows.json"
    done = python(
        *("-m", "vgpo_kernels", "compile", "--kernel", "focus cosine bf16"),
        *("--target", "sm_90", "gfx942", "--json", report),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    variants = ("", " strided", " grouped", " grouped strided")
    expected = [(f"focus cosine bf16{variant}", target) for variant in variants for target in ("sm_90", "gfx942")]
    assert [(row["kernel"], row["target"]) for row in rows] == expected
    for row in rows:
        assert 8 <= row["registers"] <= 255
        assert row["stack"] == 0
        assert row["spilled"] == (None if row["target"] == "sm_90" else 0)
        assert row["error"] is None
        assert f"{row['kernel']} " in done.stdout
    assert "8 of 8 well, 0 failed" in done.stdout
    # Whole units lie as they are loaded; another layout of the mean would cost barriers in every step of the loop.
    listings = [path.read_text() for path in (tmp_path / "cache").rglob("cosine_kernel.ttgir")]
    aligned = [text for text in listings if "cuda:90" in text and "sizePerThread = [1, 8]" in text]
    assert len(aligned) == 2
    for text in aligned:
        steps = [loop.split("scf.yield")[0] for loop in text.split("scf.for")[1:]]
        assert steps
        assert not any("ttg.convert_layout" in step for step in steps)


def test_spills_fail(tmp_path):
    done = python(FAILING, "spilling", "sm_90", "gfx942", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    rows = table(done.stdout)
    assert int(rows["spilling", "sm_90"][1]) > 0
    assert int(rows["spilling", "gfx942"][2]) > 0
    assert {cells[4] for cells in rows.values()} == {"FAILS:spills registers"}
    assert "0 of 2 well, 2 failed" in done.stdout


def test_shared_memory_above_the_targets_fails(tmp_path):
    done = python(FAILING, "greedy", "sm_90", "sm_120", "gfx942", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    rows = table(done.stdout)
    for target, limit in (("sm_90", 227), ("sm_120", 99), ("gfx942", 64)):
        _, stack, _, shared, verdict = rows["greedy", target]
        assert (stack, shared) == ("0", str(256 * 1024))
        assert verdict == f"FAILS:takes more shared memory than the {limit * 1024} bytes there are"


def test_what_does_not_compile_fails(tmp_path):
    done = python(FAILING, "broken", "sm_80", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    cells = table(done.stdout)["broken", "sm_80"]
    assert cells[:4] == ["-"] * 4
    assert cells[4].startswith("FAILS:does not compile: CompilationError")


def test_serialised_matrix_products_fail(tmp_path):
    # ptxas gives the reason; of a binary from the cache, its instructions are counted.
    for reason in ("serialized due to wgmma pipeline crossing function boundary", "serialised: 4 waits for 4 of them"):
        done = python(FAILING, "serialised", "sm_90", TRITON_CACHE_DIR=str(tmp_path))
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"FAILS: matrix products are {reason}" in done.stdout


def test_what_serialises_matrix_products():
    from vgpo_kernels._compile import serialisation

    ptx = "wgmma.mma_async wgmma.mma_async wgmma.wait_group"
    quiet = "ptxas info    : Used 240 registers, used 1 barriers"
    # As ptxas 12.8 wrote it.
    said = (
        f"{quiet}\nptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due "
        "to non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline "
        "stage in the function 'forward_kernel'\n"
    )
    asynchronous, serial = "HGMMA HGMMA WARPGROUP.DEPBAR", "HGMMA WARPGROUP.DEPBAR HGMMA WARPGROUP.DEPBAR"
    assert serialisation(quiet, ptx, asynchronous) is None
    assert serialisation(quiet, "wgmma.mma_async wgmma.wait_group", "HGMMA WARPGROUP.DEPBAR") is None
    assert serialisation(quiet, "mma.sync", "HMMA") is None
    assert "non wgmma instructions defining accumulator registers" in (serialisation(said, ptx, asynchronous) or "")
    assert serialisation("", ptx, serial) == "matrix products are serialised: 2 waits for 2 of them"


def test_a_modest_kernel_passes(tmp_path):
    done = python(FAILING, "modest", "sm_90", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(done.stdout)["modest", "sm_90"][4] == "ok"


def test_tiles_follow_the_target(tmp_path):
    # The 64 KiB and more of the large tile's transposition would not fit gfx942.
    done = python(FAILING, "fitting", "sm_120", "gfx942", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(done.stdout)
    assert int(rows["fitting", "sm_120"][3]) >= 128 * 128 * 4
    assert 64 * 64 * 4 <= int(rows["fitting", "gfx942"][3]) < 64 * 1024


def test_a_kernel_of_one_target_has_no_row_for_another():
    case = _triton.CompileCase("name", None, {}, {}, targets=("sm_90",))
    assert not list(_compile.compiled_rows([case], ["sm_80"], 1))


def test_the_interpreter_compiles_nothing():
    done = python("-m", "vgpo_kernels", "compile", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "TRITON_INTERPRET=1 replaces the compiler by an interpreter: unset it to compile\n"


def test_without_triton_there_is_a_remedy():
    code = (
        "import sys; sys.modules['triton'] = None; from vgpo_kernels.__main__ import main; sys.exit(main(['compile']))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Triton is not installed: pip install 'vgpo-kernels[triton]'\n"


def test_an_unknown_kernel_lists_the_known_ones():
    done = python("-m", "vgpo_kernels", "compile", "--kernel", "attention of a whale")
    assert done.returncode == 2
    assert "no kernel has 'attention of a whale' in its name" in done.stderr
    for known in ("focus prototype fp32", "weights", "policy_loss"):
        assert known in done.stderr


def test_an_unknown_target_lists_the_known_ones():
    done = python("-m", "vgpo_kernels", "compile", "--target", "sm_91")
    assert done.returncode == 2
    assert "invalid choice: 'sm_91'" in done.stderr
    assert "sm_100" in done.stderr
