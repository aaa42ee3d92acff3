"""`python -m vgpo_kernels doctor | compile`: what would run here and why; what the kernels compile to."""

import argparse
import sys
from collections.abc import Sequence

from vgpo_kernels import _compile, _doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 success, 1 a check failed, 2 it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m vgpo_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (_doctor, _compile):
        module.add_command(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
