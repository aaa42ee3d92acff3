"""Prints how far memory rises above inputs and results in a call, in bytes: `peak_memory.py CASE`."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

from vgpo_kernels import attention_column_sum, attention_mass, linear_policy_loss


def measured(case: str) -> int:
    """Returns what a fresh process prints for the case."""
    # A worker has memory of its own; the figures are those of two.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout)


def resident() -> int:
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * 4096


class Peak(threading.Thread):
    """The most memory seen between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.running = True

    def run(self) -> None:
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.002)

    def stop(self) -> int:
        self.running = False
        self.join()
        return self.most


def policy_loss() -> tuple[Callable[[], object], Callable[[], int]]:
    """4,096 tokens, a vocabulary of 50,000, states of 512, fp32; whole logits would take 819 MB a copy."""
    rows, tokens, vocabulary, size = 4, 1024, 50_000, 512
    hidden = torch.randn(rows, tokens, size).requires_grad_()
    weight = (torch.randn(vocabulary, size) * size**-0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows, tokens))
    old_logps, mask = torch.full((rows, tokens), -11.0), torch.ones(rows, tokens, dtype=torch.bool)
    advantages = torch.randn(rows)

    def step(tokens: int = tokens, vocabulary: int = vocabulary) -> None:
        given = (hidden[:, :tokens], weight[:vocabulary], targets[:, :tokens] % vocabulary, old_logps[:, :tokens])
        linear_policy_loss(*given, advantages, mask[:, :tokens]).loss.backward()

    # What torch loads at the first call of anything is not the loss's.
    step(1, 9)
    hidden.grad = weight.grad = None
    return step, lambda: sum(x.grad.numel() * 4 for x in (hidden, weight) if x.grad is not None)


def _attention(call: Callable[..., torch.Tensor]) -> tuple[Callable[[], object], Callable[[], int]]:
    """7B's heads, 2048 queries on 3072 keys, 1024 of them visual; a map would take 704 MB."""
    q, k = torch.randn(1, 28, 2048, 128), torch.randn(1, 4, 3072, 128)
    lse, visual = torch.full((1, 28, 2048), 70.0), torch.arange(3072)[None] < 1024
    results = []
    call(q[:, :, :1], k, lse[..., :1], visual)
    return lambda: results.append(call(q, k, lse, visual)), lambda: sum(x.numel() * 4 for x in results)


CASES = {
    "policy_loss": policy_loss,
    "attention_mass": lambda: _attention(lambda q, k, lse, visual: attention_mass(q, k, lse, visual.int() - 1, 1)),
    "attention_column_sum": lambda: _attention(attention_column_sum),
}


def main(case: str) -> None:
    torch.manual_seed(0)
    call, results = CASES[case]()
    before = resident()
    peak = Peak()
    peak.start()
    call()
    print(peak.stop() - before - results())


if __name__ == "__main__":
    main(sys.argv[1])
