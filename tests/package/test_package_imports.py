"""The package without its heavy dependencies, in fresh processes."""

from package_launch import WITHOUT_EXTENSION, python

WITHOUT = """
import sys

for name in ("triton", "transformers", "deepspeed", "liger_kernel", "trl"):
    sys.modules[name] = None  # what makes `import name` fail and find_spec find nothing
"""

EVERY_OPERATION = """
import torch
import vgpo_kernels as vk

torch.manual_seed(0)
visual = torch.zeros(4, 12, dtype=torch.bool)
visual[:, 1:4] = True
completion = torch.zeros_like(visual)
completion[:, 6:] = True
focus = vk.visual_focus_score(torch.randn(4, 12, 8), visual, completion)
assert focus[completion].ne(0).all()

weights = vk.vgpo_weights(focus[:, 6:], completion[:, 6:], torch.tensor([0, 0, 1, 1]), vk.VGPOConfig.balanced())
assert weights.token_weights.shape == (4, 6)
assert weights.trajectory_weights.std() > 0

logps = torch.randn(4, 6).requires_grad_()
out = vk.policy_loss(
    logps,
    None,
    torch.randn(4),
    completion[:, 6:],
    token_weights=weights.token_weights,
    trajectory_weights=weights.trajectory_weights,
    config=vk.PolicyLossConfig(),
)
out.loss.backward()
assert logps.grad.ne(0).all()

try:
    vk.visual_focus_score(torch.randn(4, 12, 8), visual, completion, impl="triton")
except RuntimeError as error:
    assert "pip install 'vgpo-kernels[triton]'" in str(error), error
else:
    raise AssertionError("impl='triton' ran without Triton")
"""


NO_NATIVE = """
try:
    vk.visual_focus_score(torch.randn(4, 12, 8), visual, completion, impl="native")
except RuntimeError as error:
    assert "the CPU kernels are not built" in str(error) and "setup.py build_ext" in str(error), error
    assert "or pass impl='reference'" in str(error), error
else:
    raise AssertionError("impl='native' ran without the extension")
"""


def test_everything_runs_without_triton_transformers_and_deepspeed():
    done = python("-c", WITHOUT + EVERY_OPERATION)
    assert done.returncode == 0, done.stderr


def test_without_the_extension_native_is_refused_with_the_remedy():
    done = python("-c", WITHOUT + WITHOUT_EXTENSION + EVERY_OPERATION + NO_NATIVE)
    assert done.returncode == 0, done.stderr


def test_the_doctor_runs_without_them():
    done = python("-c", WITHOUT + "from vgpo_kernels.__main__ import main; sys.exit(main(['doctor']))")
    assert done.returncode == 0, done.stderr


def test_import_brings_in_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import vgpo_kernels; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    brought = set(done.stdout.split())
    assert "vgpo_kernels" in brought
    assert not brought & {"triton", "transformers", "deepspeed", "liger_kernel", "trl", "numpy", "matplotlib"}
