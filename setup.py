"""Builds the CPU kernels of csrc/; everything else is in pyproject.toml.

Optional, so that an install without a compiler works, and for the stable ABI, so that one build serves every Python.
"""

from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
csrc = Extension(
    "vgpo_kernels._csrc",
    sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
    depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
    language="c++",
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
    ],
    py_limited_api=True,
    optional=True,
)
setup(ext_modules=[csrc], options={"bdist_wheel": {"py_limited_api": "cp310"}})
