"""Kernels that must fail `python -m vgpo_kernels compile`, each in one way, and two that must not.

Run as a script, it compiles the one named first for the targets named after it.
"""

import argparse
import sys

from vgpo_kernels import _compile
from vgpo_kernels._triton import CompileCase, tl, triton


@triton.jit
def spilling(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + offsets)
    # Every element is needed again after the sum, in a register of its own.
    tl.store(out_ptr + offsets, b_x * tl.sum(b_x, axis=0))


@triton.jit
def transposing(x_ptr, out_ptr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    b_x = tl.load(x_ptr + rows * BLOCK + columns)
    tl.store(out_ptr + rows * BLOCK + columns, tl.trans(b_x))


@triton.jit
def broken(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 2 * BLOCK)))


@triton.jit
def printing(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(0, 4):
        b_x = tl.load(x_ptr + o_x).to(tl.float16)
        b_sum = tl.dot(b_x, b_x, b_sum)
        # The call waits for the products before it.
        tl.device_print("step", step)
    tl.store(out_ptr + o_x, b_sum)


def fitting_tiles(target: str) -> dict[str, int]:
    """Returns the tile of `transposing` that a target has room for, and warps to match."""
    return {"BLOCK": 64, "num_warps": 8} if target == "gfx942" else {"BLOCK": 128, "num_warps": 32}


def case(name: str) -> CompileCase:
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    if name == "fitting":
        return CompileCase(name, transposing, signature, {}, tiles=fitting_tiles)
    kernel, block, warps = {
        "spilling": (spilling, 32768, 1),
        "modest": (spilling, 1024, 4),
        # 256 KiB pass through shared memory, more than any target has.
        "greedy": (transposing, 256, 32),
        "broken": (broken, 128, 4),
        "serialised": (printing, 64, 4),
    }[name]
    return CompileCase(name, kernel, signature, {"BLOCK": block}, {"num_warps": warps})


if __name__ == "__main__":
    name, *targets = sys.argv[1:]
    options = argparse.Namespace(target=targets, kernel=None, json=None)
    sys.exit(_compile.run(options, [case(name)]))
