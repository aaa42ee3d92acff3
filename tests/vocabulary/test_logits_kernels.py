"""The Triton kernels that walk rows of logits, against torch in float64, and against the reference."""

import math

import pytest
import torch
from logits_cases import (
    DTYPES,
    MIXES,
    SCALED,
    SOME_CONFIG,
    Case,
    LossInputs,
    assert_gradient,
    assert_loss,
    assert_statistics,
    dense,
    dense_loss,
    formula_gradient,
    random_case,
)
from policy_loss_cases import config_id, every_config
from vocabulary_cases import PLAIN, Scaling

from vgpo_kernels.policy_loss import PolicyLossConfig
from vgpo_kernels.testing import assert_error_budget, ragged_mask
from vgpo_kernels.vocabulary import reference
from vgpo_kernels.vocabulary import triton as kernels
from vgpo_kernels.vocabulary.triton import logits

ON_GPU = torch.cuda.is_available()
TOKEN_CONFIGS = [config for config in every_config() if config.importance_sampling_level == "token"]
SIZES = [
    1,  # a certain token
    2,
    5,  # no whole vector
    23,  # one or a few vectors, both edges
    1003,  # odd, so rows begin at every place in a vector; less than a tile
    2048,  # a tile of 128 threads at two bytes an element, and two at four
    9001,  # several tiles, the last one cut
    16387,  # one more vector than a tile of 1024 threads at two bytes
]
VOCABULARIES = [
    50257,  # GPT-2, odd
    151936,  # Qwen
    152064,  # Qwen, padded
]


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_statistics_and_gradient(vocabulary, dtype, scaling, device):
    case = random_case((2, 1, vocabulary), dtype, device)
    assert_statistics(case, scaling)
    assert_gradient(case, scaling, torch.empty_like(case.logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vocabularies_of_models(vocabulary, dtype, device):
    case = random_case((1, 2, vocabulary), dtype, device)
    assert_statistics(case)
    assert_loss(case, LossInputs.random(case), SOME_CONFIG, torch.empty_like(case.logits))


@pytest.mark.parametrize("config", TOKEN_CONFIGS, ids=config_id)
def test_every_option_of_the_loss(config, device):
    """Log-probs of a few units: a ratio makes their last digit one of the gradient's, times the ratio and advantage."""
    case = random_case((2, 3, 9), torch.float32, device, spread=1.0)
    assert_loss(case, LossInputs.random(case), config, torch.empty_like(case.logits))


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
def test_loss_of_scaled_logits(dtype, scaling, device):
    case = random_case((2, 3, 1003), dtype, device)
    assert_loss(case, LossInputs.random(case, scaling), SOME_CONFIG, torch.empty_like(case.logits), scaling)


def test_optional_arguments_left_out(device):
    case = random_case((2, 3, 33), torch.float32, device)
    inputs = LossInputs.random(case)._replace(old_logps=None, ref_logps=None, row_weights=None)
    assert_loss(case, inputs, PolicyLossConfig(), torch.empty_like(case.logits))
    logps, lse, entropy = logits.logits_logprobs(case.logits, case.targets, None, 1.0, None, False)
    expected = logits.logits_logprobs(case.logits, case.targets, None, 1.0, None, True)
    assert entropy is None
    assert torch.equal(logps, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_gradient_alone(given, device):
    case = random_case((2, 3, 33), torch.float32, device)
    assert_gradient(case, PLAIN, torch.empty_like(case.logits), given)


@pytest.mark.parametrize("scaling", [PLAIN, SCALED], ids=str)
def test_the_formula_of_the_gradient_is_what_autograd_gives(scaling):
    case = random_case((2, 3, 33), torch.float64, "cpu")
    leaf = case.logits.clone().requires_grad_()
    results = dense(leaf, case.targets, scaling)
    total = sum((grad * result).sum() for grad, result in zip(case.grads, results, strict=True))
    (expected,) = torch.autograd.grad(total, leaf)
    _, lse, entropy = (x.detach() for x in results)
    torch.testing.assert_close(formula_gradient(case.logits, case, lse, entropy, scaling), expected)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [64, 77])  # rows that begin at whole vectors, and rows that do not
def test_strided_logits_and_every_dtype_of_the_gradient(vocabulary, dtype, out_dtype, device):
    """TRL passes logits[:, :-1]; the gradient's rows then begin elsewhere."""
    wide = random_case((2, 3, vocabulary), dtype, device)
    case = Case(wide.logits[:, :-1], wide.targets[:, :-1], tuple(grad[:, :-1] for grad in wide.grads))
    assert not case.logits.is_contiguous()
    assert_statistics(case)
    assert_gradient(case, PLAIN, torch.empty(case.logits.shape, dtype=out_dtype, device=device))
    inputs = LossInputs.random(case)
    assert_loss(case, inputs, SOME_CONFIG, torch.empty(case.logits.shape, dtype=out_dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [3, 45])  # inside a vector, and vectors with edges
def test_rows_that_begin_anywhere_and_their_neighbours(vocabulary, dtype, device):
    """Nothing beside the row is written, and what stands there is not taken for a logit."""
    case = random_case((1, 8, vocabulary), dtype, device)
    inputs = LossInputs.random(case)._replace(old_logps=None, ref_logps=None)
    exact = dense_loss(case.logits.double(), case, inputs, PLAIN, SOME_CONFIG)
    same_dtype = dense_loss(case.logits.float(), case, inputs, PLAIN, SOME_CONFIG)
    logps, entropy = torch.empty(2, 1, 8, device=device)
    gradient = torch.empty_like(case.logits)
    for start in range(8):
        here = slice(start, start + 1)
        flat = torch.full((64,), math.nan, dtype=dtype, device=device)
        row = flat[start : start + vocabulary].view(1, 1, vocabulary)
        row.copy_(case.logits[:, here])
        arguments = [None if x is None else x[:, here] for x in inputs]
        logps[:, here], entropy[:, here] = logits.logits_loss(
            row, case.targets[:, here], None, *arguments, 1.0, None, SOME_CONFIG, gradient[:, here]
        )
        masked = torch.zeros(1, 1, dtype=torch.bool, device=device)
        assert torch.equal(row, case.logits[:, here])
        for valid, wanted in ((None, gradient[:, here]), (masked, torch.zeros_like(row))):
            logits.logits_loss(row, case.targets[:, here], valid, *arguments, 1.0, None, SOME_CONFIG, row)
            assert torch.equal(row, wanted)
        assert flat.isnan().sum() == 64 - vocabulary
    for name, actual, baseline, wanted in zip(
        ("logps", "entropy", "gradient"), (logps, entropy, gradient), same_dtype, exact, strict=True
    ):
        assert_error_budget(name, actual, baseline.to(actual.dtype), wanted)


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
@pytest.mark.parametrize("vocabulary", [9, 5001, 20011])  # no tile, a few of either width
def test_in_place_is_out_of_place_bit_for_bit(vocabulary, dtype, scaling, device):
    case = random_case((2, 1, vocabulary), dtype, device)
    inputs = LossInputs.random(case, scaling)
    apart, inside = torch.empty_like(case.logits), case.logits.clone()
    expected = logits.logits_loss(case.logits, case.targets, None, *inputs, *scaling, SOME_CONFIG, apart)
    # The same memory under another tensor.
    results = logits.logits_loss(inside, case.targets, None, *inputs, *scaling, SOME_CONFIG, inside.view_as(inside))
    assert torch.equal(inside, apart)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)

    _, lse, entropy = logits.logits_logprobs(case.logits, case.targets, None, *scaling, True)
    inside = case.logits.clone()
    for values, out in ((case.logits, apart), (inside, inside)):
        logits.logits_gradient(
            values, case.targets, None, lse, entropy, case.grads[0], case.grads[2], case.grads[1], *scaling, out
        )
    assert torch.equal(inside, apart)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_masked_rows_are_never_read_and_get_zeros(dtype, device):
    case = random_case((3, 3, 1003), dtype, device)
    inputs = LossInputs.random(case)
    valid = ragged_mask([3, 0, 1], 3).to(device)
    clean = torch.empty_like(case.logits)
    expected = logits.logits_loss(case.logits, case.targets, valid, *inputs, 1.0, None, SOME_CONFIG, clean)
    assert (clean[~valid] == 0).all()
    assert clean[valid].ne(0).any(-1).all()

    dirty = torch.where(valid.unsqueeze(-1), case.logits, math.nan)
    targets = torch.where(valid, case.targets, -100)
    unread = LossInputs(*(torch.where(valid, value, math.nan) for value in inputs))
    for out in (torch.empty_like(dirty), dirty):
        results = logits.logits_loss(dirty, targets, valid, *unread, 1.0, None, SOME_CONFIG, out)
        assert torch.equal(out, clean)
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)
            assert (result[~valid] == 0).all()

    dirty = torch.where(valid.unsqueeze(-1), case.logits, math.nan)
    statistics = logits.logits_logprobs(dirty, targets, valid, 1.0, None, True)
    for result, wanted in zip(statistics, dense(case.logits.double(), case.targets, PLAIN), strict=True):
        assert (result[~valid] == 0).all()
        torch.testing.assert_close(result[valid], wanted[valid].float())
    grads = [torch.where(valid, grad, math.nan) for grad in case.grads]
    logits.logits_gradient(dirty, targets, valid, *statistics[1:], grads[0], grads[2], grads[1], 1.0, None, dirty)
    assert (dirty[~valid] == 0).all()
    assert not dirty.isnan().any()


@pytest.mark.parametrize(("vocabulary", "scaling"), [(300, Scaling(0.7)), (20011, PLAIN)])
@pytest.mark.parametrize("margin", [1.0, 9.0, 14.0])
def test_targets_of_probability_near_0_and_1(margin, vocabulary, scaling, device):
    """Logits around 20, where an LSE would cancel against the target's logit."""
    values = 20 + torch.randn(1, 6, vocabulary)
    values[..., 7] = values.amax(-1) + margin
    for token in (7, 8):  # apart: the errors of sure ones are far smaller
        targets = torch.full((1, 6), token)
        case = Case(values.to(device), targets.to(device), tuple(torch.ones(3, 1, 6, device=device)))
        assert_statistics(case, scaling)
        inputs = LossInputs(None, torch.ones(1, 6, device=device), None, None)
        assert_loss(case, inputs, PolicyLossConfig(), torch.empty_like(case.logits), scaling)


@pytest.mark.parametrize("margin", [14.0, 30.0, 80.0])
def test_a_certain_target_keeps_its_digits(margin, device):
    """Where the sum is 1 and a little, logps is minus that little; torch gives 0, for the last two in float64 too.

    Only the other elements of the target's vector are lost; here they are unlikely.
    """
    values = 20 + torch.randn(1, 3, 2000)  # one tile
    values[..., :16] = 0.0
    values[..., 7] = values.amax(-1) + margin
    targets = torch.full((1, 3), 7, device=device)
    logps, _, entropy = logits.logits_logprobs(values.half().to(device), targets, None, 1.0, None, True)
    z = values.half().double()
    z = (z - z[..., 7:8])[..., torch.arange(2000) != 7]
    rest = z.exp().sum(-1)
    torch.testing.assert_close(logps.double().cpu(), -rest.log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        entropy.double().cpu(), rest.log1p() - (z.exp() * z).sum(-1) / (1 + rest), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_forbidden_tokens(dtype, softcap, device):
    """Logits of -inf, as a processor of logits leaves: some, whole vectors and tiles of them, all but the target."""
    case = random_case((1, 4, 5003), dtype, device)
    values = case.logits.clone()
    values[0, 0, ::2] = -math.inf
    values[0, 1, :4096] = -math.inf
    values[0, 2, 100:] = -math.inf
    targets = torch.tensor([[1, 5000, 3, 77]], device=device)
    values[0, 3] = -math.inf
    values[0, 3, 77] = -3.0
    case = case._replace(logits=values, targets=targets)
    scaling = Scaling(0.8, softcap)
    assert_statistics(case, scaling)
    inputs = LossInputs.random(case, scaling)
    out = torch.empty_like(values)
    assert_loss(case, inputs, SOME_CONFIG, out, scaling)
    if softcap is None:
        assert (out[values == -math.inf] == 0).all()
    # By the entropy too: 0 * log(0) is 0.
    _, lse, entropy = logits.logits_logprobs(values, targets, None, *scaling, True)
    ones = torch.ones_like(lse)
    logits.logits_gradient(values, targets, None, lse, entropy, None, ones, None, *scaling, out)
    assert out.isfinite().all()


def test_a_forbidden_target_and_rows_of_nothing(device):
    values = torch.randn(1, 3, 40)
    values[0, 0, 3] = -math.inf
    values[0, 1] = -math.inf
    values[0, 2, 5] = math.nan
    case = Case(values.to(device), torch.tensor([[3, 3, 3]], device=device), tuple(torch.ones(3, 1, 3, device=device)))
    logps, lse, entropy = logits.logits_logprobs(case.logits, case.targets, None, 1.0, None, True)
    exact = dense(case.logits.double(), case.targets, PLAIN)
    assert logps[0, 0] == -math.inf
    assert logps[0, 1:].isnan().all()
    assert lse[0, 1] == -math.inf
    assert lse[0, 2].isnan()
    assert entropy[0, 1:].isnan().all()
    torch.testing.assert_close(lse[0, 0], exact[1][0, 0].float())
    torch.testing.assert_close(entropy[0, 0], exact[2][0, 0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_huge_logits(dtype, temperature, device):
    values = torch.randn(1, 4, 300).to(dtype)
    values[0, 0, 9] = 1e30
    values[0, 1, 9] = -1e30
    values[0, 2, ::3] = 1e30
    values[0, 3] = -1e30
    targets = torch.tensor([[9, 2, 3, 4]], device=device)
    case = Case(values.to(device), targets, tuple(torch.ones(3, 1, 4, device=device)))
    scaling = Scaling(temperature)
    for token in range(4):
        one = Case(case.logits[:, token : token + 1], targets[:, token : token + 1], case.grads)
        assert_statistics(one, scaling)
        inputs = LossInputs(None, torch.ones(1, 1, device=device), None, None)
        assert_loss(one, inputs, PolicyLossConfig(), torch.empty(1, 1, 300, dtype=dtype, device=device), scaling)


@pytest.mark.parametrize("token", [-1, -(2**40), 33, 2**31, 2**32 + 5])
def test_a_target_out_of_range_is_nan_and_nothing_else(token, device):
    case = random_case((1, 3, 33), torch.float32, device)
    wrong = case.targets.clone()
    wrong[0, 1] = token
    logps, lse, entropy = logits.logits_logprobs(case.logits, wrong, None, 1.0, None, True)
    expected = logits.logits_logprobs(case.logits, case.targets, None, 1.0, None, True)
    assert logps.isnan().tolist() == [[False, True, False]]
    assert torch.equal(logps[0, ::2], expected[0][0, ::2])
    torch.testing.assert_close(lse, expected[1])
    torch.testing.assert_close(entropy, expected[2])


def test_many_rows(device):
    """Rows lie on grid axis 0, whose limit is not the 65,535 of the others; the interpreter takes fewer rows."""
    shape = (700, 100, 3) if ON_GPU else (4, 10, 3)
    case = random_case(shape, torch.float32, device)
    assert_statistics(case)
    assert_loss(case, LossInputs.random(case), SOME_CONFIG, torch.empty_like(case.logits))


def test_same_bits_from_run_to_run(device):
    case = random_case((2, 2, 20011), torch.float16, device)
    inputs = LossInputs.random(case)
    first, second = torch.empty_like(case.logits), torch.empty_like(case.logits)
    results = [
        logits.logits_loss(case.logits, case.targets, None, *inputs, 1.0, None, SOME_CONFIG, out)
        for out in (first, second)
    ]
    assert torch.equal(first, second)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_scaling_in_place_by_fewer_programs_than_pieces(device, monkeypatch):
    monkeypatch.setattr(logits, "MULTIPROCESSORS", dict.fromkeys(logits.MULTIPROCESSORS, 1))
    wide = torch.randn(2, 5, 9001, device=device).half()
    for factor in (3.0, 1.0):
        scaled = wide.clone()
        logits.scale_gradient_(scaled[:, 1:], torch.tensor(factor, device=device))
        assert torch.equal(scaled[:, 1:], wide[:, 1:] * factor)
        assert torch.equal(scaled[:, :1], wide[:, :1])


def test_a_factor_of_1_costs_one_wave_of_programs(monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda **_: None

    monkeypatch.setattr(logits, "scale_kernel", Recorded())
    logits.scale_gradient_(torch.empty(8, 2560, 152_064, dtype=torch.bfloat16, device="meta"), torch.ones(()))
    logits.scale_gradient_(torch.empty(1, 2, 9000, device="meta"), torch.ones(()))
    assert grids == [(3 * 132,), (4,)]


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5)])
def test_no_rows(shape, device):
    case = random_case(shape, torch.float32, device)
    logps, lse, entropy = kernels.logits_logprobs(case.logits, case.targets, None, 1.0, None, True)
    assert logps.shape == lse.shape == entropy.shape == shape[:2]
    assert kernels.logits_kl(
        case.logits[0] if shape[0] else case.logits[:, 0], case.logits.flatten(0, 1), 1.0, None
    ).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(dtype, device):
    """Masks, garbage and gradients of all three, as the operators call it."""
    case = random_case((3, 4, 77), dtype, device)
    inputs = LossInputs.random(case)
    valid = ragged_mask([4, 0, 2], 4).to(device)
    found, expected = [], []
    for module, results in ((kernels, found), (reference, expected)):
        out, loss_out = torch.empty_like(case.logits), torch.empty_like(case.logits)
        logps, lse, entropy = module.logits_logprobs(case.logits, case.targets, valid, 0.7, 6.0, True)
        grads = (case.grads[0], case.grads[2], case.grads[1])
        module.logits_gradient(case.logits, case.targets, valid, lse, entropy, *grads, 0.7, 6.0, out)
        results += [logps, lse, entropy, out]
        results += module.logits_loss(case.logits, case.targets, valid, *inputs, 0.7, 6.0, SOME_CONFIG, loss_out)
        results.append(loss_out)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
