"""Python processes of the package's tests: their own interpreter, so that nothing is imported before."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Before the first import of the package: as where nothing compiled csrc/.
WITHOUT_EXTENSION = "import sys; sys.modules['vgpo_kernels._csrc'] = None\n"


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the repository and this folder importable, and Triton compiling, not interpreting."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**inherited, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
