"""Compiles the log-probability kernel for sm_90 and prints, for each case, how its matrix loop is fed and waits.

Run as a script with the names of compile cases, in a process where Triton compiles.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.vocabulary.triton import compile_cases


def compiled(case: CompileCase) -> dict[str, Any]:
    """Returns the code of a case, by its kind."""
    kernel: Any = case.kernel
    signature = {argument: case.signature.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    constexprs, options = case.on("sm_90")
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def machine_code(binary: bytes) -> str:
    """Returns what the disassembler that Triton ships makes of a binary."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tools / "nvdisasm", "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    cases = {case.name: case for case in compile_cases()}
    report = {}
    for name in sys.argv[1:]:
        asm = compiled(cases[name])
        lines = machine_code(asm["cubin"]).splitlines()
        report[name] = {
            "wgmma": asm["ptx"].count("wgmma.mma_async"),
            "mma": asm["ptx"].count("mma.sync"),
            "copies": asm["ptx"].count("cp.async.cg.shared.global"),
            "products": sum("HGMMA" in line for line in lines),
            "groups": sum("HGMMA" in line and "gsb0" in line for line in lines),
        }
    print(json.dumps(report))
