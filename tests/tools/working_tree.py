"""Which commit a checkout is at, and what was changed since."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Written by what is measured, so that one machine's results do not make the next one's dirty.
RESULTS = "benchmarks/results"
# Names the commit that a copy without git's own files is of, its files as they were there.
COMMIT = "VGPO_COMMIT"


@dataclass(frozen=True)
class WorkingTree:
    """A checkout's commit and its changed paths, untracked ones among them, and their source: git, or VGPO_COMMIT."""

    commit: str
    changed: tuple[str, ...]
    source: str = "git"

    @property
    def dirty(self) -> bool:
        return bool(self.changed)


def read_working_tree(root: Path = ROOT) -> WorkingTree:
    """Asks git for the state of a checkout; ignored files and `benchmarks/results/` do not count as changes.

    Args:
        root: the checkout's folder.

    A copy without `.git` is of the commit that VGPO_COMMIT names, and taken for unchanged.

    Raises:
        ValueError: no git, no checkout or no commit there.
    """
    if os.environ.get(COMMIT) and not (root / ".git").exists():
        return WorkingTree(os.environ[COMMIT], (), COMMIT)
    commit = _git(root, "rev-parse", "--verify", "HEAD").strip()
    listed = ("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--")
    status = _git(root, *listed, ".", f":(exclude){RESULTS}")
    return WorkingTree(commit, tuple(entry[3:] for entry in status.split("\0") if entry))


def _git(root: Path, *arguments: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise ValueError("git was not found: expected it on the PATH, to name the commit") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{str(root)!r}: expected a git checkout with a commit, git said {error.stderr!r}") from error
    return run.stdout
