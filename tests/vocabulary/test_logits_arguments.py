"""What the Triton kernels on rows of logits are compiled for, and what the compiler is promised of their arguments."""

import torch

from vgpo_kernels.vocabulary.triton import kl, logits, row_helpers


def test_whole_vectors_are_promised_only_where_they_are(device):
    """The compiler believes it: a wrong promise is a misaligned store."""
    wide = torch.empty(3, 5, 77, dtype=torch.bfloat16, device=device)
    even = torch.empty(3, 5, 80, dtype=torch.bfloat16, device=device)
    pairs = [
        (wide, wide, True),
        (wide, torch.empty_like(wide), True),
        (wide, torch.empty_like(wide, dtype=torch.float32), True),
        (wide[:, :-1], torch.empty_like(wide[:, :-1].contiguous()), False),
        (wide[:1, :-1], torch.empty_like(wide[:1, :-1].contiguous()), True),
        (even[:, :-1], torch.empty_like(even[:, :-1].contiguous()), True),
        (even[..., 1:], torch.empty_like(even[..., 1:].contiguous()), False),
        (even[..., 1:], torch.empty_like(even)[..., 1:], True),
        (even[..., 1:], torch.empty_like(even)[..., 9:], True),
    ]
    for x, out, expected in pairs:
        assert row_helpers.vectors_match(x, out) == expected
        bytes_of_vector = 16 // x.element_size() * out.element_size()
        fits = []
        for row, out_row in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
            head = -row.data_ptr() % 16 // x.element_size()
            fits.append((out_row.data_ptr() + head * out.element_size()) % bytes_of_vector == 0)
        assert not expected or all(fits)


def test_no_compilation_a_length_or_a_temperature():
    """Lengths, strides and scales are run-time arguments, and whole numbers among them are not specialised."""
    for module, kernel in ((logits, logits.logits_kernel), (kl, kl.logits_kl_kernel)):
        sizes = [name for name in kernel.arg_names if "stride" in name or name in ("length", "vocabulary")]
        assert set(sizes) == set(module.RUN_TIME)
        assert {"score_scale", "inverse_cap"} <= set(kernel.arg_names)
    assert row_helpers.softcap_scales(0.5, None).keys() == row_helpers.softcap_scales(0.7, 30.0).keys()


def test_compile_cases_name_every_argument():
    for case in (*logits.compile_cases(), *kl.compile_cases()):
        for target in ("sm_90", "gfx942"):
            constants, options = case.on(target)
            assert set(case.signature) | set(constants) == set(case.kernel.arg_names)
            assert not set(case.signature) & set(constants)
            assert options["num_warps"] * (64 if target == "gfx942" else 32) <= 1024
