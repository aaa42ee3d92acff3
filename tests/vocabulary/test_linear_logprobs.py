"""Log-probabilities of hidden states and of logits, and how much they depend on the image, in plain torch."""

import pytest
import torch
from vocabulary_cases import PLAIN, Scaling, dense_logits, dense_logprobs, of_logits, random_case, scaled

from vgpo_kernels import linear_logprobs, linear_visual_dependency, selective_logprobs
from vgpo_kernels.testing import assert_error_budget
from vgpo_kernels.vocabulary import chunked

SCALED = Scaling(temperature=0.7, softcap=3.0)
LENGTHS = [7, 3, 1, 0]
NAMES = ("logps", "entropy", "lse")


def run(case, scaling=PLAIN, **options):
    return linear_logprobs(
        case.hidden,
        case.weight,
        case.targets,
        bias=case.bias,
        temperature=scaling.temperature,
        softcap=scaling.softcap,
        mask=case.mask,
        entropy=True,
        **options,
    )


def masked(values, mask):
    return [torch.where(mask, x, 0.0) for x in values]


# 151,936 and 152,064 are Qwen2.5's; 50,257 and 50 are of no tile; 7, 72 are odd sizes of states.
@pytest.mark.parametrize(
    ("vocabulary", "size", "dtype"),
    [
        (50, 16, torch.float32),
        (151_936, 64, torch.float32),
        (152_064, 72, torch.bfloat16),
        (50_257, 7, torch.float16),
    ],
)
@pytest.mark.parametrize("scaling", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_results_and_gradients_within_the_budget(vocabulary, size, dtype, scaling, device):
    case = random_case(
        [3, 2, 0], 3, size=size, vocabulary=vocabulary, bias=vocabulary == 50, dtype=dtype, scaling=scaling
    )
    exact = case.to(torch.float64)
    cotangents = [torch.randn(3, 3) for _ in NAMES]

    def results(case, values):
        total = sum((x * c).sum() for x, c in zip(values, cotangents, strict=True))
        return [x.detach() for x in values], torch.autograd.grad(total, case.parameters())

    dense = [masked(dense_logprobs(x.hidden, x.weight, x.bias, x.targets, scaling), case.mask) for x in (case, exact)]
    moved = case.on(device)
    cotangents = [x.to(device) for x in cotangents]
    found, gradients = ([x.cpu() for x in values] for values in results(moved, run(moved, scaling)))
    cotangents = [x.cpu() for x in cotangents]
    same, same_gradients = results(case, dense[0])
    wanted, wanted_gradients = results(exact, dense[1])
    for name, *of_each in zip(NAMES, found, same, wanted, strict=True):
        assert_error_budget(name, *of_each)
    names = ("hidden", "weight", "bias")
    for name, *of_each in zip(names, gradients, same_gradients, wanted_gradients, strict=False):
        assert_error_budget(name, *of_each)


@pytest.mark.parametrize("which", NAMES)
def test_each_result_has_its_own_gradient(which):
    case = random_case(LENGTHS, 7, bias=True, dtype=torch.float64)
    dense = dict(zip(NAMES, dense_logprobs(case.hidden, case.weight, case.bias, case.targets, SCALED), strict=True))
    expected = torch.autograd.grad(torch.where(case.mask, dense[which], 0.0).sum(), case.parameters())
    found = torch.autograd.grad(getattr(run(case, SCALED), which).sum(), case.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4)])
def test_any_leading_dimensions(shape):
    hidden, weight = torch.randn(*shape, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    targets = torch.randint(0, 11, shape)
    found = linear_logprobs(hidden, weight, targets, entropy=True)
    for one, other in zip(found, dense_logprobs(hidden, weight, None, targets, PLAIN), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(selective_logprobs(hidden @ weight.T, targets, entropy=True), found, strict=True):
        torch.testing.assert_close(one, other)


def test_states_of_any_strides_are_read_in_place():
    whole = torch.randn(2, 9, 8, dtype=torch.float64)
    hidden, weight = whole[:, 3:-1].requires_grad_(), torch.randn(11, 8, dtype=torch.float64)
    targets = torch.randint(0, 11, (2, 5))
    found = linear_logprobs(hidden, weight, targets)
    torch.testing.assert_close(found.logps, dense_logprobs(hidden, weight, None, targets, PLAIN)[0])
    assert found.entropy is None
    found.logps.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_frozen_parts_get_no_gradient():
    for name in ("hidden", "weight"):
        case = random_case(LENGTHS, 7)
        getattr(case, name).requires_grad_(False)
        run(case).logps.sum().backward()
        assert getattr(case, name).grad is None
        assert all(x.grad is not None for x in case.parameters() if x.requires_grad)


def test_masked_tokens_may_hold_anything():
    case = random_case(LENGTHS, 7)
    hidden = torch.where(case.mask[..., None], case.hidden.detach(), torch.nan).requires_grad_()
    found = linear_logprobs(hidden, case.weight, case.targets, mask=case.mask, entropy=True)
    for one, other in zip(found, run(case), strict=True):
        assert torch.equal(one, other)
    sum(x.sum() for x in found).backward()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[~case.mask].any()


def test_targets_close_to_certain_and_to_impossible():
    """Right to the rounding of 1 + rest, not to that of an LSE of 80, which is 60 times as coarse."""
    weight = torch.tensor([[68.0], [80.0], [71.5], [-80.0]])
    hidden, targets = torch.ones(4, 1), torch.arange(4)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    for found in (linear_logprobs(hidden, weight, targets), selective_logprobs(hidden @ weight.T, targets)):
        error = (found.logps.double() - exact).abs()
        assert error[1] < 1.2e-7
        assert (error <= 1.2e-7 * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("bias", [-torch.inf, -1e30, 1e30], ids=str)
def test_infinite_and_huge_logits(bias):
    """A banned token has probability 0 and gives no NaN to entropy or gradients; a huge logit takes it all."""
    case = random_case([4], 4, vocabulary=6, bias=True, dtype=torch.float64)
    with torch.no_grad():
        case.bias[2] = bias
    targets = torch.tensor([[0, 1, 3, 4]])
    found = linear_logprobs(case.hidden, case.weight, targets, bias=case.bias, entropy=True)
    logits = case.hidden @ case.weight.T + case.bias
    expected = of_logits(logits, targets)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    gradients = torch.autograd.grad(found.logps.sum() + found.entropy.sum(), case.parameters())
    assert all(x.isfinite().all() for x in gradients)
    on_logits = selective_logprobs(logits.detach().requires_grad_(), targets, entropy=True)
    for one, other in zip(on_logits, expected, strict=True):
        torch.testing.assert_close(one, other)
    impossible = selective_logprobs(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]))
    assert impossible.logps.tolist() == [-torch.inf]


def test_70_000_rows():
    """More than any grid axis but the first holds, and more than one chunk."""
    hidden, weight = torch.randn(70_000, 3), torch.randn(5, 3)
    targets = torch.randint(0, 5, (70_000,))
    logits = hidden @ weight.T
    expected = dense_logprobs(hidden, weight, None, targets, PLAIN)[0]
    torch.testing.assert_close(linear_logprobs(hidden, weight, targets).logps, expected)
    torch.testing.assert_close(selective_logprobs(logits, targets).logps, expected)
    torch.testing.assert_close(selective_logprobs(logits[:, None], targets[:, None]).logps[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_every_dtype(dtype):
    logits = (3 * torch.randn(4, 7, 50)).to(dtype).requires_grad_()
    targets, mask = torch.randint(0, 50, (4, 7)), torch.rand(4, 7) < 0.7
    exact = logits.detach().double().requires_grad_()
    found = selective_logprobs(logits, targets, temperature=0.7, softcap=3.0, entropy=True, mask=mask)
    of_each = [
        masked(of_logits(scaled(x, SCALED), targets), mask)
        for x in (logits.float() if dtype != torch.float32 else logits, exact)
    ]
    for name, one, same, wanted in zip(NAMES, found, *of_each, strict=True):
        assert_error_budget(name, one.detach(), same.detach(), wanted.detach())
    gradients = [
        torch.autograd.grad(sum(x.sum() for x in values), leaf)[0]
        for values, leaf in ((found, logits), (of_each[0], logits), (of_each[1], exact))
    ]
    assert_error_budget("logits", *gradients)


def test_logits_sliced_as_trainers_do():
    logits = torch.randn(2, 6, 50, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 50, (2, 5))
    selective_logprobs(logits[:, :-1], targets).logps.sum().backward()
    found, logits.grad = logits.grad, None
    of_logits(logits[:, :-1], targets)[0].sum().backward()
    torch.testing.assert_close(found, logits.grad)


@pytest.mark.parametrize("kind", ["k3", "kl", "logratio"])
@pytest.mark.parametrize("scaling", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_visual_dependency(kind, scaling):
    case = random_case(LENGTHS, 7, bias=True, dtype=torch.float64)
    corrupted, other = torch.randn_like(case.hidden), case.weight.detach() + 0.1 * torch.randn_like(case.weight)
    log_p = dense_logits(case.hidden, case.weight, case.bias, scaling).log_softmax(-1).detach()
    log_q = dense_logits(corrupted, other, case.bias, scaling).log_softmax(-1).detach()
    index = case.targets.clamp(min=0)[..., None]
    d = (log_q.gather(-1, index) - log_p.gather(-1, index))[..., 0]
    expected = {"k3": d.exp() - d - 1, "logratio": -d, "kl": (log_p.exp() * (log_p - log_q)).sum(-1)}[kind]
    found = linear_visual_dependency(
        case.hidden,
        corrupted,
        case.weight,
        case.targets,
        kind=kind,
        weight_corrupted=other,
        bias=case.bias,
        temperature=scaling.temperature,
        softcap=scaling.softcap,
        mask=case.mask,
    )
    torch.testing.assert_close(found, torch.where(case.mask, expected, 0.0))
    assert not found.requires_grad


def test_visual_dependency_of_the_same_states_is_zero():
    case = random_case(LENGTHS, 7)
    for kind in ("k3", "kl", "logratio"):
        same = linear_visual_dependency(case.hidden, case.hidden, case.weight, case.targets, kind=kind, mask=case.mask)
        assert not same.any()


def test_visual_dependency_makes_no_whole_logits(monkeypatch):
    made = []
    chunks = chunked.Chunks
    monkeypatch.setattr(chunked, "Chunks", lambda *args, **options: made.append(chunks(*args, **options)) or made[-1])
    monkeypatch.setitem(chunked.MEMORY_BUDGETS, "cpu", 6_000_000)
    case = random_case([50] * 4, 50, vocabulary=4000, dtype=torch.float64, size=4)
    found = linear_visual_dependency(case.hidden, 0.5 * case.hidden, case.weight, case.targets, kind="kl")
    assert made[0].tokens < 100
    log_p, log_q = (dense_logits(x, case.weight, None, PLAIN).log_softmax(-1) for x in (case.hidden, case.hidden / 2))
    torch.testing.assert_close(found, (log_p.exp() * (log_p - log_q)).sum(-1).detach())
