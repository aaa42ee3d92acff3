"""The Gluon forward of sm_90, run by threads in place of warp groups: the results of the plain forward."""

import subprocess
import sys

import pytest
import torch
from attention_checks import bundled, case, check_forward, without_finite_scores
from gluon_threads import Kernel

from vgpo_kernels.attention import reference
from vgpo_kernels.attention.triton import forward, hopper_forward, hopper_kernel


@pytest.fixture
def attend(monkeypatch, device):
    if device != "cpu":
        pytest.skip("threads in place of warp groups need tensors on the CPU")
    launches = []
    kernel = Kernel(hopper_kernel, "hopper_forward_kernel")
    monkeypatch.setattr(hopper_forward, "takes", lambda *_: not launches.append(1))
    monkeypatch.setattr(hopper_kernel, "hopper_forward_kernel", kernel)

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
        ("full", 64, (70, 512)),  # whole tiles alone
        ("full", 128, (70, 320)),
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


@pytest.mark.parametrize(("mask", "kind"), [("causal", "scattered"), ("causal", "holes"), ("full", "none")])
def test_kinds_of_key(attend, mask, kind):
    tensors = case(mask, kind, (1, 1), (200, 260), 128, torch.float16)
    check_forward(attend(tensors), tensors)


def test_no_query_sees_a_key(attend):
    tensors = case("full", "image", (1, 1), (70, 140), 64, torch.float16)
    tensors["key_end"][:] = 0
    out, mass, lse = attend(tensors)
    assert (out == 0).all()
    assert (mass == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("seen", [128, 100])
def test_scores_of_minus_infinity(attend, seen):
    # In whole tiles, alone and after cut ones.
    tensors, rows = without_finite_scores(seen, torch.float16, 64)
    results = attend(tensors)
    expected = reference.visual_attention(**bundled(tensors), scale=0.125, softcap=None)
    for actual, known, nothing in zip(results, expected, (0.0, 0.0, -torch.inf), strict=True):
        torch.testing.assert_close(actual, known, rtol=2e-3, atol=2e-3)
        assert (actual[:, :, rows] == nothing).all()


def test_groups_of_heads_in_bfloat16_without_mass(attend):
    tensors = case("left", "image", (4, 2), (70, 140), 64, torch.bfloat16)
    out, mass, lse = attend(tensors, with_mass=False)
    assert mass is None
    plain = attend(tensors)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[2])
    check_forward(plain, tensors)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"target": "sm_100"}, "compute capability 9.0"),
        ({"D": 80}, "heads of 64 or 128"),
        ({"dtype": torch.float32}, "in bf16 or fp16"),
        ({"softcap": 30.0}, "no soft-cap"),
        ({"scale": 0.0}, "scales of at least"),
        ({"scale": float("nan")}, "scales of at least"),
        ({"Lk": 0}, "empty or has a stride of 0"),
        ({"expanded": True}, "empty or has a stride of 0"),
    ],
)
def test_what_it_covers_and_what_it_says_of_the_rest(change, why, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    one = {"target": "sm_90", "D": 64, "dtype": torch.bfloat16, "softcap": None, "scale": 0.1, "Lk": 9} | change
    monkeypatch.setattr(hopper_forward, "target_of", lambda _: one["target"])
    with FakeTensorMode():
        like = {"dtype": one["dtype"], "device": "cuda"}
        q, k = (torch.empty(1, 2, length, one["D"], **like) for length in (70, one["Lk"]))
        v = torch.empty_strided(k.shape, (1, 0, one["D"], 1), **like) if "expanded" in change else k
        monkeypatch.delenv("VGPO_HOPPER", raising=False)
        assert not hopper_forward.takes(q, k, v, one["scale"], one["softcap"])
        monkeypatch.setenv("VGPO_HOPPER", "1")
        if why is None:
            assert hopper_forward.takes(q, k, v, one["scale"], one["softcap"])
            return
        with pytest.warns(RuntimeWarning, match=f"the plain kernel runs, since .*{why}"):
            assert not hopper_forward.takes(q, k, v, one["scale"], one["softcap"])


def test_attention_does_without_gluon_until_it_is_asked_for():
    code = "import sys; sys.modules['triton.experimental.gluon'] = None; import vgpo_kernels.attention.triton"
    subprocess.run([sys.executable, "-c", code], check=True)
