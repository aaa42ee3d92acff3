"""Prints how far memory rises above inputs and gradients in a linear policy loss, in bytes: for a fresh process."""

import threading
import time

import torch

from vgpo_kernels import linear_policy_loss

ROWS, TOKENS, VOCABULARY, SIZE = 4, 1024, 50_000, 512


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


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, TOKENS, SIZE).requires_grad_()
    weight = (torch.randn(VOCABULARY, SIZE) * SIZE**-0.5).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    old_logps, mask = torch.full((ROWS, TOKENS), -11.0), torch.ones(ROWS, TOKENS, dtype=torch.bool)
    # What torch loads at the first call of anything is not the loss's.
    linear_policy_loss(
        hidden[:, :1], weight[:9], 0 * targets[:, :1], None, torch.ones(ROWS), mask[:, :1]
    ).loss.backward()
    hidden.grad = weight.grad = None
    before = resident()
    peak = Peak()
    peak.start()
    linear_policy_loss(hidden, weight, targets, old_logps, torch.randn(ROWS), mask).loss.backward()
    gradients = sum(x.grad.numel() * 4 for x in (hidden, weight))
    print(peak.stop() - before - gradients)


if __name__ == "__main__":
    main()
