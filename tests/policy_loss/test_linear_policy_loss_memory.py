"""What the loss of hidden states takes beside inputs and gradients, measured in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_on_a_cpu():
    """4,096 tokens, a vocabulary of 50,000, states of 512, fp32: whole logits would take 819 MB a copy."""
    script = Path(__file__).with_name("peak_memory.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200e6
