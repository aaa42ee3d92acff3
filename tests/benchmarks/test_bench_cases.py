"""What the cases count, and that every one of them can be asked of the functions it is meant for."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness.cases import OURS, PLAIN, Case, Task
from benchmarks.peers import attention as peers
from benchmarks.tasks import attention_cases
from benchmarks.tasks import test_attention as attention
from benchmarks.tasks import test_decode as decode
from benchmarks.tasks import test_focus as focus
from benchmarks.tasks import test_hidden_loss as linear
from benchmarks.tasks import test_policy_loss as policy_loss
from benchmarks.tasks import test_weights as weights

CPU = torch.device("cpu")
TASKS = [
    attention.MASS,
    attention.COLUMN,
    attention.FORWARD,
    attention.BACKWARD,
    decode.DECODE,
    focus.FOCUS,
    weights.WEIGHTS,
    policy_loss.LOGPS,
    policy_loss.LOGITS,
    policy_loss.SELECTIVE,
    linear.LOGPROBS,
    linear.LOSS,
]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)

# The table of the paper's cases, worked out for 790 TFLOP/s: attention of whole sequences, then mass, in ms; the linear
# loss in ms; one copy of bf16 logits in GB.
TABLE = [
    (1.22, 0.19, 85, 6.2),
    (4.87, 0.69, 204, 14.9),
    (2.72, 0.11, 194, 10.0),
    (6.96, 1.52, 194, 10.0),
    (12.5, 2.44, 310, 10.0),
]


@pytest.mark.parametrize("number", range(1, 6))
def test_counted_work_is_that_of_the_papers_table(number: int):
    def flops(task: Task) -> float:
        case = next(case for case in task.cases if case.name.startswith(f"{number}:") and case.kind == "cuda")
        return task.work(case).flops

    whole, mass, loss, _ = TABLE[number - 1]
    assert flops(attention.FORWARD) / 790e9 == pytest.approx(whole, rel=0.01)
    assert flops(attention.MASS) / 790e9 == pytest.approx(mass, rel=0.03)
    assert flops(linear.LOSS) / 790e9 == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("number", range(1, 6))
def test_logits_are_those_of_the_papers_table(number: int):
    case = next(c for c in policy_loss.SELECTIVE.cases if c.name.startswith(f"{number}:") and c.kind == "cuda")
    assert policy_loss.SELECTIVE.work(case).bytes / 1e9 == pytest.approx(TABLE[number - 1][3], rel=0.01)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("case", [c for c in attention.MASS.cases if "tiny" in c.levels], ids=lambda case: case.name)
def test_pairs_are_counted_right(case: Case, whole: bool):
    given = attention_cases.attention_inputs(case, CPU, whole=whole)
    seen = (
        peers.visible_keys(given.sequences, given.q.shape[2])[:, 0]
        & (given.sequences >= 0)[:, -given.q.shape[2] :, None]
    )
    found = (int(seen.sum()), int((seen & given.visual_mask[:, None]).sum()))
    assert attention_cases.visible_pairs(case, whole=whole or bool(case.sizes.get("packed"))) == found


@pytest.mark.parametrize("task", [task for task in TASKS if task is not decode.DECODE], ids=lambda task: task.name)
def test_every_case_fits_our_function(task: Task):
    """Every size, the paper's, too, on tensors without memory; masks and lengths are read for errors: not theirs."""
    for case in task.cases:
        if case.sizes.get("packed") or case.sizes.get("left_padded"):
            continue
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task.providers[OURS].run(task.inputs(case, CPU))


@every_task
def test_names_are_unique_on_each_kind_of_device(task: Task):
    for kind in ("cpu", "cuda"):
        for level in ("tiny", "small", "paper"):
            entries = list(task.chosen([level], kind))
            assert len({(case.name, provider) for case, provider in entries}) == len(entries) > 0
            assert {provider for case, provider in entries if case.providers is None} == set(task.providers)
    assert {PLAIN, OURS} <= set(task.providers)


@every_task
def test_inputs_are_the_same_in_every_process(task: Task):
    first, again = (task.inputs(task.tiny, CPU) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else True


@pytest.mark.parametrize("case", [c for c in attention.MASS.cases if "tiny" in c.levels], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees(case: Case):
    """What only a GPU times is checked on a CPU, uncompiled."""
    given = attention_cases.attention_inputs(case, CPU)
    torch.testing.assert_close(attention.flex_mass(given), attention.mass(given, "reference"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_output_agrees():
    given = attention.whole_inputs(attention.FORWARD.tiny, CPU)
    for found, expected in zip(attention.flex_output(given), attention.fused(given, "reference"), strict=True):
        torch.testing.assert_close(found, expected)
