"""The Gluon forward of sm_90, run by threads in place of warp groups: the results of the plain forward."""

import pytest
import torch
from attention_checks import bundled, case, check_forward
from gluon_threads import Kernel

from vgpo_kernels.attention.triton import forward, hopper_forward, hopper_kernel


@pytest.fixture
def attend(monkeypatch, device):
    if device != "cpu":
        pytest.skip("threads in place of warp groups need tensors on the CPU")
    launches = []
    kernel = Kernel(hopper_kernel, "hopper_forward_kernel")
    monkeypatch.setattr(hopper_forward, "takes", lambda *_: not launches.append(1))
    monkeypatch.setattr(hopper_forward, "hopper_forward_kernel", kernel)

    def attend(tensors, **options):
        scale = tensors["q"].shape[-1] ** -0.5
        results = forward.visual_attention(**bundled(tensors), scale=scale, softcap=None, **options)
        assert launches
        return results

    return attend


# Two programs a head, of which the last has a warp group without queries.
@pytest.mark.parametrize(
    ("mask", "D", "lengths"),
    [
        ("full", 64, (70, 620)),  # more tiles of keys than slots
        ("causal", 64, (150, 270)),
        ("window", 128, (150, 270)),
        ("packed", 64, (150, 150)),
        ("left", 128, (150, 330)),
        ("empty", 64, (150, 150)),
        ("arbitrary", 128, (70, 130)),
    ],
)
def test_masks(attend, mask, D, lengths):
    tensors = case(mask, "image", (1, 1), lengths, D, torch.float16)
    check_forward(attend(tensors), tensors)


@pytest.mark.parametrize("kind", ["scattered", "holes"])
def test_kinds_of_key(attend, kind):
    tensors = case("causal", kind, (1, 1), (200, 200), 128, torch.float16)
    check_forward(attend(tensors), tensors)


def test_groups_of_heads_in_bfloat16_without_mass(attend):
    tensors = case("left", "image", (4, 2), (70, 140), 64, torch.bfloat16)
    out, mass, lse = attend(tensors, with_mass=False)
    assert mass is None
    plain = attend(tensors)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[2])
    check_forward(plain, tensors)
