"""Compiles kernels for sm_90 and prints, for each, whether its matrix products are asynchronous and fed so.

Run as a script with the names of compile cases, in a process where Triton compiles.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.attention.triton import compile_cases


def listing(case: CompileCase) -> str:
    """Returns the PTX of a case."""
    kernel: Any = case.kernel
    signature = {argument: case.signature.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    constexprs, options = case.on("sm_90")
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    cases = {case.name: case for case in compile_cases()}
    report = {}
    for name in sys.argv[1:]:
        ptx = listing(cases[name])
        report[name] = [ptx.count(word) for word in ("wgmma.mma_async", "mma.sync", "cp.async.cg")]
    print(json.dumps(report))
