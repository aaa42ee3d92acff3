"""What an H100 is predicted to reach, kernel by kernel, from compiled code and the rates of its units; not measured.

Read with Triton 3.6 at head size 128: instructions of the main loops, and per multiprocessor and clock 4096 bf16
operations, 16 exp2, 4 instructions of a warp, 15 bytes of memory. Changes since: docs/dev/performance.md.
"""

from dataclasses import dataclass

from benchmarks.report import OURS

DEVICE = "H100"
# Of the data sheet: operations a second of dense bf16 products, bytes a second of memory.
PEAKS = {"flops": 990e12, "bytes": 3.35e12}
MASS, COLUMN = "attention mass, given the LSE", "attention column sum, given the LSE"
FORWARD, BACKWARD = "attention with LSE and mass", "attention backward with a mass gradient"
DECODE, FOCUS = "attention of one token to a cache", "focus"
LOGITS, LOGPROBS = "policy loss of logits", "log-probs of hidden states"


@dataclass(frozen=True)
class Prediction:
    """One prediction.

    Args:
        task: the task of the benchmarks whose call launches the kernel.
        bound: what is counted, "flops" or "bytes".
        low, high: the share of the peak that is expected.
        note: what it holds for.
        by_call: whether the task's time shows it; a kernel that is a part of the call is seen by a profiler alone.
        provider: whose entry it is.
    """

    task: str
    bound: str
    low: float
    high: float
    note: str = ""
    by_call: bool = True
    provider: str = OURS


PREDICTIONS = (
    Prediction(MASS, "flops", 0.40, 0.50),
    Prediction(COLUMN, "flops", 0.35, 0.45),
    Prediction(FORWARD, "flops", 0.40, 0.50, "two programs a multiprocessor"),
    Prediction(FORWARD, "flops", 0.44, 0.62, "10 to 25% above the plain kernel", provider="vgpo_kernels in Gluon"),
    Prediction(BACKWARD, "flops", 0.24, 0.33, "counted as 5 products, 7 are made"),
    Prediction(BACKWARD, "flops", 0.30, 0.35, "the kernel of dK and dV, of its 4 products", by_call=False),
    Prediction(BACKWARD, "flops", 0.35, 0.53, "the kernel of dQ, of its 3 products", by_call=False),
    Prediction(DECODE, "bytes", 0.47, 0.63, "the whole call, case 1: 35 us, not 55"),
    Prediction(DECODE, "bytes", 0.71, 0.90, "the kernel alone, in one wave", by_call=False),
    Prediction(FOCUS, "bytes", 0.60, 0.70),
    Prediction(LOGITS, "bytes", 0.60, 0.70, "one read and one write of the logits"),
    Prediction(LOGPROBS, "flops", 0.48, 0.56),
)
