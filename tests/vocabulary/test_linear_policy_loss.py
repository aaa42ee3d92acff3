"""The policy loss of hidden states and a head: exact against whole logits, and what it costs."""

import dataclasses

import pytest
import torch
from policy_loss_cases import config_id, every_config, gpu_ulps, mean_magnitude
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from vocabulary_cases import PLAIN, Case, Scaling, dense_loss, random_case

from vgpo_kernels import PolicyLossConfig, linear_policy_loss
from vgpo_kernels.testing import assert_error_budget
from vgpo_kernels.vocabulary import chunked, matmul, reference
from vgpo_kernels.vocabulary.backend import Head

# A full row, an odd one, a single token, a row of padding.
LENGTHS = [7, 3, 1, 0]
SCALED = Scaling(temperature=0.7, softcap=3.0)
# One token of 50 logits at a time and more: what a budget must hold beside them is a few blocks of 2^18 elements.
SMALL_BUDGET = 4 * 4 * (1 << 18) + 1500


def run(case: Case, config: PolicyLossConfig, scaling: Scaling = PLAIN, **options):
    return linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        completion_mask=case.mask,
        bias=case.bias,
        temperature=scaling.temperature,
        softcap=scaling.softcap,
        config=config,
        **case.by_token,
        **options,
    )


def gradients(loss, case: Case, **options):
    return torch.autograd.grad(loss, case.parameters(), **options)


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scaling", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_equals_the_loss_of_whole_logits(impl, level, scaling, device):
    """fp32 within twice the error of fp32 torch: loss, logps, entropy, per-token loss, every gradient, every metric.

    A GPU adds the exponentials of the losses of tokens, which cancel in their mean.
    """
    case = random_case(LENGTHS, 7, bias=True, scaling=scaling)
    config = PolicyLossConfig("grpo", level, epsilon_high=0.28, beta=0.05, clip_ratio_dual=3.0)
    expected = dense_loss(case.to(torch.float64), config, scaling)
    plain = dense_loss(case, config, scaling)
    output = run(case.on(device), config, scaling, impl=impl)
    cancelled = (mean_magnitude(expected.per_token_loss, case.mask, config, None) / expected.loss.abs()).item()
    added = gpu_ulps(config) if impl == "triton" else 0.0
    more = {"loss": added * cancelled, "per_token_loss": added, "logps": 0.0, "entropy": 0.0}
    for name, ulps in more.items():
        of_each = [getattr(x, name).detach().cpu() for x in (output, plain, expected)]
        assert_error_budget(name, *of_each, ulps=2.0 + ulps)
    exact = case.to(torch.float64)
    case_on = case.on(device)
    found = gradients(run(case_on, config, scaling, impl=impl).loss, case_on)
    same = gradients(dense_loss(case, config, scaling).loss, case)
    for name, *of_each in zip(
        ("hidden", "weight", "bias"),
        found,
        same,
        gradients(dense_loss(exact, config, scaling).loss, exact),
        strict=True,
    ):
        assert_error_budget(name, *(x.cpu() for x in of_each))
    for name, value in plain.metrics.items():
        torch.testing.assert_close(output.metrics[name].cpu(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.metrics["entropy"].cpu(), plain.entropy.sum() / case.mask.sum())


@pytest.mark.parametrize("config", every_config(), ids=config_id)
def test_every_option_of_the_loss_in_float64(config):
    """Several chunks, the mask between them; the one code of the terms, so float64 agrees to its end."""
    case = random_case(LENGTHS, 7, dtype=torch.float64, scaling=SCALED)
    expected = dense_loss(case, config, SCALED)
    output = run(case, config, SCALED, memory_budget=2 * SMALL_BUDGET)
    torch.testing.assert_close(output.loss, expected.loss)
    for found, wanted in zip(gradients(output.loss, case), gradients(expected.loss, case), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_num_items_divides_the_sum(loss_type):
    case = random_case(LENGTHS, 7, dtype=torch.float64)
    config = PolicyLossConfig(loss_type, epsilon_high=1.3)
    output = run(case, config, num_items_in_batch=123)
    expected = dense_loss(case, config, PLAIN, num_items_in_batch=123)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(gradients(output.loss, case)[1], gradients(expected.loss, case)[1])


@pytest.mark.parametrize("without", ["old_logps", "ref_logps", "token_weights", "trajectory_weights"])
def test_optional_arguments(without):
    case = random_case(LENGTHS, 7, dtype=torch.float64)
    case.by_token[without] = None
    for level in ("token", "sequence"):
        config = PolicyLossConfig("bnpo", level)
        output, expected = run(case, config), dense_loss(case, config, PLAIN)
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(gradients(output.loss, case)[0], gradients(expected.loss, case)[0])


def test_advantages_of_rows():
    case = random_case(LENGTHS, 7, dtype=torch.float64)
    case.by_token["advantages"] = torch.randn(4)
    output, expected = run(case, PolicyLossConfig()), dense_loss(case, PolicyLossConfig(), PLAIN)
    torch.testing.assert_close(gradients(output.loss, case)[1], gradients(expected.loss, case)[1])


# 151,936 and 152,064: Qwen2.5 and its padded form; 50,257 is odd, rows of it begin at any alignment; 7 and 72 are sizes
# that no tile divides.
@pytest.mark.parametrize(
    ("vocabulary", "size", "dtype"),
    [
        (151_936, 64, torch.float32),
        (152_064, 64, torch.bfloat16),
        (151_936, 72, torch.float16),
        (50_257, 7, torch.float32),
        (50_257, 72, torch.bfloat16),
    ],
)
def test_error_budget_at_real_vocabularies(vocabulary, size, dtype, device):
    case = random_case([3, 2], 3, size=size, vocabulary=vocabulary, bias=True, dtype=dtype)
    config = PolicyLossConfig("dapo", epsilon_high=0.28, beta=0.05)
    exact = case.to(torch.float64)
    expected, plain = dense_loss(exact, config, PLAIN), dense_loss(case, config, PLAIN)
    moved = case.on(device)
    output = run(moved, config)
    for name in ("loss", "logps", "entropy"):
        assert_error_budget(name, *(getattr(x, name).detach().cpu() for x in (output, plain, expected)))
    found = [x.cpu() for x in gradients(output.loss, moved)]
    same, wanted = gradients(plain.loss, case), gradients(expected.loss, exact)
    for name, *of_each in zip(("hidden", "weight", "bias"), found, same, wanted, strict=True):
        assert_error_budget(name, *of_each)


def test_half_precision_logits_are_not_rounded(device):
    """Logits of 100 +- 0.1: a bfloat16 holds them to 0.25 only, and all log-probabilities would be one."""
    hidden = torch.tensor([[[16.0, 1.0]]], dtype=torch.bfloat16, device=device)
    weight = torch.stack([torch.full((64,), 6.25), torch.linspace(-0.1, 0.1, 64)], dim=1).bfloat16().to(device)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[0, 0]
    targets = torch.arange(64, device=device)[:, None]
    rest = (None, torch.ones(64, device=device), torch.ones_like(targets, dtype=torch.bool))
    output = linear_policy_loss(hidden.expand(64, 1, 2), weight, targets, *rest)
    torch.testing.assert_close(output.logps[:, 0].double(), exact, rtol=0, atol=2e-5)


def test_chunks_of_any_size_agree():
    case = random_case(LENGTHS, 7, dtype=torch.float64)
    whole = run(case, PolicyLossConfig())
    expected = gradients(whole.loss, case)
    index = case.mask.nonzero(as_tuple=True)
    chunks = chunked.Chunks(reference, case.hidden, Head(case.weight, None, 1.0, None), index, 2 * SMALL_BUDGET)
    assert 1 <= chunks.tokens < 11  # else the test shows nothing
    small = run(case, PolicyLossConfig(), memory_budget=2 * SMALL_BUDGET)
    for found, wanted in zip(gradients(small.loss, case), expected, strict=True):
        torch.testing.assert_close(found, wanted)


class Shapes(TorchDispatchMode):
    """The largest tensor that any operation made, in elements."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value._base is None:
                self.largest = max(self.largest, value.numel())
        return result


def watch(monkeypatch, mode) -> None:
    """Turns the mode on inside the operator, where one around it sees nothing."""
    watched = chunked.policy_loss

    def within(*arguments):
        with mode:
            return watched(*arguments)

    monkeypatch.setattr(chunked, "policy_loss", within)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_whole_logits(level, monkeypatch):
    case = random_case([40] * 25, 40, vocabulary=3000, size=8)
    watch(monkeypatch, shapes := Shapes())
    run(case, PolicyLossConfig("bnpo", level), memory_budget=8_000_000).loss.backward()
    # What the budget leaves beside a few blocks is a third of the logits.
    assert 3000 * 40 < shapes.largest < 1000 * 3000 * 2 // 5


@pytest.mark.parametrize(
    ("level", "wanted", "products"),
    [
        ("token", ("hidden", "weight"), 3),
        ("sequence", ("hidden", "weight"), 4),
        ("token", ("hidden",), 2),
        ("token", ("weight",), 2),
        ("token", (), 1),
        ("sequence", (), 1),
    ],
)
def test_products_of_the_valid_tokens_only(level, wanted, products, monkeypatch):
    """2 M H V operations a product; 11 of 28 tokens are valid; a frozen head or frozen states need one less."""
    case = random_case(LENGTHS, 7)
    for name in ("hidden", "weight"):
        getattr(case, name).requires_grad_(name in wanted)
    watch(monkeypatch, counter := FlopCounterMode(display=False))
    output = run(case, PolicyLossConfig("bnpo", level))
    if wanted:
        with FlopCounterMode(display=False) as backward:
            output.loss.backward()
        assert backward.get_total_flops() == 0
    assert counter.get_total_flops() == products * 2 * sum(LENGTHS) * 16 * 50
    assert output.loss.requires_grad == bool(wanted)


def test_masked_tokens_may_hold_anything():
    case = random_case(LENGTHS, 7)
    expected = run(case, PolicyLossConfig("grpo", beta=0.1))
    wanted = gradients(expected.loss, case)
    poisoned = {
        name: x if x is None or x.dim() == 1 else torch.where(case.mask, x, torch.nan)
        for name, x in case.by_token.items()
    }
    hidden = torch.where(case.mask[..., None], case.hidden.detach(), torch.nan).requires_grad_()
    dirty = dataclasses.replace(case, hidden=hidden, by_token=poisoned)
    output = run(dirty, PolicyLossConfig("grpo", beta=0.1))
    assert torch.equal(output.loss, expected.loss)
    found = gradients(output.loss, dirty)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert not found[0][~case.mask].any()


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_batch_without_a_valid_token(impl, level, device):
    """Such a micro-batch keeps ranks in step: its loss is 0, and its backward runs, with zeros."""
    case = random_case([0, 0], 5).on(device)
    output = run(case, PolicyLossConfig("grpo", level), impl=impl)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert not case.hidden.grad.any()
    assert not case.weight.grad.any()


def test_backward_twice_and_scaled():
    case = random_case(LENGTHS, 7)
    loss = run(case, PolicyLossConfig()).loss
    once = gradients(loss, case, retain_graph=True)
    thrice = gradients(3.0 * loss, case, retain_graph=True)
    again = gradients(loss, case)
    for first, scaled, second in zip(once, thrice, again, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(scaled, 3.0 * first)


def test_tied_embeddings_sum_both_gradients():
    case = random_case(LENGTHS, 7, dtype=torch.float64)
    ids = torch.randint(0, 50, (4, 7))

    def losses(loss):
        tied = dataclasses.replace(case, hidden=torch.tanh(torch.nn.functional.embedding(ids, case.weight)))
        return torch.autograd.grad(loss(tied), case.weight)[0]

    found = losses(lambda tied: run(tied, PolicyLossConfig()).loss)
    expected = losses(lambda tied: dense_loss(tied, PolicyLossConfig(), PLAIN).loss)
    torch.testing.assert_close(found, expected)


def test_no_grad_and_inference_mode():
    case = random_case(LENGTHS, 7)
    expected = run(case, PolicyLossConfig())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = run(case, PolicyLossConfig())
        assert not output.loss.requires_grad
        torch.testing.assert_close(output.loss, expected.loss.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_states_and_head(dtype):
    case = random_case(LENGTHS, 7, bias=True)
    with torch.autocast("cpu", dtype=dtype):
        output = run(case, PolicyLossConfig())
    output.loss.backward()
    assert case.weight.grad.dtype == torch.float32
    cast = run(case.to(dtype), PolicyLossConfig())
    assert torch.equal(output.loss, cast.loss)


def test_weight_gradient_is_summed_in_float32(device):
    """4,096 tokens of the same small gradient: summed in bfloat16 most of them would be lost."""
    hidden = torch.ones(1, 4096, 8, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, device=device).requires_grad_()
    targets = torch.zeros(1, 4096, dtype=torch.int64, device=device)
    rest = (None, torch.ones(1, device=device), torch.ones_like(targets, dtype=torch.bool))
    config = PolicyLossConfig("dr_grpo", max_completion_length=1)
    budget = matmul.tile_bytes(hidden.dtype, hidden.device) + 4 * 4 * (1 << 18) + 1000  # chunks of a few tokens
    linear_policy_loss(hidden, weight, targets, *rest, config=config, memory_budget=budget).loss.backward()
    assert weight.grad[:, 0].tolist() == [-2048.0, 2048.0]


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_repeats_bit_for_bit(impl, device):
    case = random_case(LENGTHS, 7).on(device)
    first, second = (gradients(run(case, PolicyLossConfig(), impl=impl).loss, case) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gradcheck():
    case = random_case([3, 1], 3, vocabulary=5, size=3, bias=True, dtype=torch.float64)
    hidden, weight, bias = case.parameters()
    old = torch.full((2, 3), -1.6, dtype=torch.float64)  # constants, and bounds that nothing meets
    case.by_token.update(old_logps=old, ref_logps=old)
    config = PolicyLossConfig("bnpo", epsilon_low=1.0, epsilon_high=100.0, beta=0.1)

    def loss(hidden, weight, bias):
        return run(dataclasses.replace(case, hidden=hidden, weight=weight, bias=bias), config, SCALED).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_half_precision_keeps_the_small_gradients_of_long_rows(level, device):
    """A mean of a row divides by its length: after, not before, gradients of logits are rounded to half precision."""
    case = random_case([600, 1], 600, size=8, vocabulary=300, dtype=torch.float16).on(device)
    config = PolicyLossConfig("grpo", level)
    exact = case.to(torch.float64)
    expected = gradients(2.0**16 * dense_loss(exact, config, PLAIN).loss, exact)
    same = gradients(2.0**16 * dense_loss(case, config, PLAIN).loss, case)
    found = gradients(2.0**16 * run(case, config).loss, case)
    for name, *of_each in zip(("hidden", "weight"), found, same, expected, strict=True):
        assert_error_budget(name, *of_each)


def test_a_weight_of_any_strides():
    case = random_case(LENGTHS, 7, dtype=torch.float64)
    expected = gradients(run(case, PolicyLossConfig()).loss, case)
    columns = dataclasses.replace(case, weight=case.weight.detach().t().contiguous().t().requires_grad_())
    for one, other in zip(gradients(run(columns, PolicyLossConfig()).loss, columns), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("most", [None, 512, 4096])
def test_pieces_of_a_weight_that_are_cast_stay_within_their_bytes(most):
    """Also for wide states: 4,096 rows of 3,584 are 59 MB in float32."""
    weight = torch.zeros(5000, 3584, dtype=torch.bfloat16)
    pieces = list(matmul._tiles(weight, torch.float32, most))
    assert max(piece.numel() * 4 for _, piece in pieces) <= matmul.tile_bytes(weight.dtype, weight.device)
    assert sum(piece.shape[0] for _, piece in pieces) == 5000
