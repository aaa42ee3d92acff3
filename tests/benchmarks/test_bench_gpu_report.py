"""`benchmarks/gpu_report.py` reads what `scripts/gpu_bench.sh` leaves; the figures here are made up."""

import json
from pathlib import Path

import pytest
from result_factory import COMMIT, entry, green_tests, write_results

from benchmarks import gpu_report, predictions
from benchmarks.predictions import DECODE, PREDICTIONS

CARD = "NVIDIA H100 80GB HBM3"
CLOCKS = """epoch_seconds,step,sm_mhz,memory_mhz,power_w,power_limit_w,celsius,utilization
100.00,small/mass,300,2619,90,700,30,0
200.00,small/mass,1500,2619,500,700,60,100
201.00,small/mass,1700,2619,600,700,61,100
202.00,small/mass,1900,2619,650,700,61,100
203.00,small/mass,[N/A],2619,[N/A],700,61,100
300.00,small/mass,345,2619,100,700,40,0
nvidia-smi: a line that is no row
"""

SUMMARY = """a card
step                          seconds    limit  result
small/mass                         30       40  well
small/forward                      52       45  out of time: tests/one.py::test_one
of 2 steps 1 failed, 0 did not begin

small/forward: out of time:        128          8           3        184  -  139264
a card
step                          seconds    limit  result
tiles/attention forward            12       80  failed (1): why
tiles/attention mass                0        0  not begun: no time left
"""


def _measured(task: str, tflops: float, gbs: float) -> dict:
    """An entry of ours at these rates, below ceilings of 800 TFLOP/s and 3000 GB/s."""
    work = {"flops": tflops * 1e12 * 2e-3, "bytes": gbs * 1e9 * 2e-3}
    return entry(
        task, "vgpo_kernels", "ours", 2e-3, when=[199.5, 202.5], ceilings={"tflops": 800.0, "gbs": 3000.0}, **work
    )


def _machine(device: str = CARD) -> dict:
    return {"device": device, "kind": "cuda", "driver": "580.1", "cuda": "13.0", "cpu": "A processor", "threads": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    entries = [
        _measured(predictions.MASS, 446.0, 10.0),
        _measured(predictions.FORWARD, 700.0, 10.0),
        _measured(DECODE, 1.0, 670.0),
    ]
    write_results(tmp_path / "small.json", entries, machine=_machine())
    (tmp_path / "tests.json").write_text(json.dumps(green_tests(device=CARD, failed=2, green=False)))
    (tmp_path / "clocks.csv").write_text(CLOCKS)
    (tmp_path / "summary.txt").write_text(SUMMARY)
    tried = [(64, True, {"1: 7B": 1.0}, None), (32, False, {"1: 7B": 0.8}, None), (16, False, {}, "spills")]
    names = ("tiles", "present", "ratios", "error")
    results = [
        {"kernel": "a kernel"} | dict(zip(names, ({"BLOCK": block}, *rest), strict=True)) for block, *rest in tried
    ]
    (tmp_path / "tiles.json").write_text(json.dumps({"timed": True, "results": results}))
    return tmp_path


def _row(text: str, *cells: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (row,) = (row for row in rows if all(cell in row for cell in cells))
    return row


def test_each_figure_stands_beside_its_prediction_with_the_clock(folder: Path) -> None:
    text = gpu_report.text(gpu_report.find([folder]))
    # 446 of 990 TFLOP/s, and of the 800 that the machine reached.
    assert _row(text, predictions.MASS, "as predicted")[3:12] == [
        *("2.00 ms", "446 TFLOP/s", "45.1%", "40 to 50%", "55.8%", "50 to 62%"),
        *("as predicted", "1700 MHz (1500 to 1900)", "600 W"),
    ]
    assert _row(text, predictions.FORWARD, "above")[5] == "70.7%"
    # 670 of 3350 GB/s, and of the 3000 of a large copy.
    assert _row(text, DECODE, "below")[5:10] == ["20.0%", "47 to 63%", "22.3%", "52 to 70%", "below"]
    assert _row(text, "the kernel of dQ, of its 3 products")[9] == "a profiler shows it"
    assert _row(text, predictions.FOCUS, "60 to 70%")[9] == "not measured"


def test_it_says_where_figures_come_from_and_what_is_wrong_with_it(folder: Path) -> None:
    text = gpu_report.text(gpu_report.find([folder]))
    assert f"- small.json: {CARD}, driver 580.1, CUDA 13.0, A processor, 16 threads; torch 2.13.0" in text
    assert f"commit {COMMIT}, clean" in text
    assert "- clocks: 300 to 1900 MHz, 90 to 650 W" in text
    assert "- tests: **red**, 900 passed, 2 failed, 0 errors, 3 skipped" in text
    assert _row(text, "a kernel") == ["a kernel", "BLOCK 64", "BLOCK 32", "1: 0.800", "2 timed, 1 refused"]
    expected = (
        "1 well, 1 out of time (small/forward), 1 not begun (tiles/attention mass), 1 failed (tiles/attention forward)"
    )
    assert f"- steps: {expected}; **1 of 2 calls did not end by themselves**" in text
    assert SUMMARY.strip() in text
    unknown = {"commit": "unknown", "source": "VGPO_COMMIT", "machine": _machine()}
    write_results(folder / "small.json", [_measured(predictions.MASS, 446.0, 10.0)], **unknown)
    (folder / "clocks.csv").unlink()
    (folder / "peers.json").write_text("{")
    text = gpu_report.text(gpu_report.find([folder]))
    assert "commit **unknown**, not of git" in text
    assert "- clocks: **not noted**" in text
    assert "- not read: " in text


def test_on_another_card_nothing_is_held_to_predictions(folder: Path) -> None:
    write_results(folder / "small.json", [_measured(predictions.MASS, 446.0, 10.0)], machine=_machine("Another card"))
    text = gpu_report.text(gpu_report.find([folder]))
    assert _row(text, predictions.MASS, "45.1%")[9] == "not judged"


def test_predictions_name_tasks_that_are_measured() -> None:
    from benchmarks import tune_timing

    for task in {prediction.task for prediction in PREDICTIONS}:
        assert tune_timing.task_named(task).name == task
    assert all(0 < prediction.low < prediction.high < 1 for prediction in PREDICTIONS)


def test_the_command_writes_a_file_or_says_that_there_is_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_report.main([str(folder), "--output", str(tmp_path / "report.md")]) == 0
    assert (tmp_path / "report.md").read_text().startswith("# On a GPU\n")
    (tmp_path / "empty").mkdir()
    assert gpu_report.main([str(tmp_path / "empty")]) == 2
    assert "expected files of scripts/gpu_bench.sh, found none" in capsys.readouterr().err
