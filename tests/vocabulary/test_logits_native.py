"""The CPU kernels that walk rows of logits, against torch in float64 and against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import config_id, every_config
from vocabulary_cases import PLAIN, Scaling

from vgpo_kernels import PolicyLossConfig
from vgpo_kernels.testing import assert_error_budget, ragged_mask
from vgpo_kernels.vocabulary import native, reference

pytestmark = pytest.mark.usefixtures("capability")  # every test on every instruction set
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALED = Scaling(1.3, 5.0)  # the cap bends logits of a standard deviation of 4
MIXES = [(torch.float32, PLAIN), (torch.float16, Scaling(0.7)), (torch.bfloat16, SCALED), (torch.float32, SCALED)]
TOKEN_CONFIGS = [config for config in every_config() if config.importance_sampling_level == "token"]
SOME_CONFIG = PolicyLossConfig.official(beta=0.1)
SIZES = [
    1,  # a certain token
    3,  # less than the narrowest vector
    17,  # a vector of 16 and one more
    257,  # 16 vectors of 16, summed in float, and one more
    2049,  # a block and one more
    5003,  # two blocks and a cut one, rows that begin anywhere
]


class Inputs:
    """Logits (B, T, V) with targets, a mask, and what is known of each token; `to` promotes or rounds."""

    def __init__(self, shape, dtype=torch.float32, scaling=PLAIN, spread=4.0):
        self.scaling = scaling
        self.logits = (spread * torch.randn(shape)).to(dtype)
        self.targets = torch.randint(shape[-1], shape[:-1])
        self.valid = torch.rand(shape[:-1]) < 0.7
        logps = reference.logits_logprobs(self.logits.double(), self.targets, None, *scaling, False)[0].float()
        self.old, self.ref = (logps + 0.6 * torch.randn(logps.shape) for _ in range(2))
        self.advantages, self.weights = torch.randn(logps.shape), 0.1 + torch.rand(logps.shape)
        self.grads = [torch.randn(logps.shape) for _ in range(3)]

    def poisoned(self):
        """Nothing of what stands where the mask is 0 may be read."""
        self.logits = torch.where(self.valid[..., None], self.logits, math.nan)
        self.targets = torch.where(self.valid, self.targets, -100)
        by_token = (self.old, self.ref, self.advantages, self.weights, *self.grads)
        self.old, self.ref, self.advantages, self.weights, *self.grads = (
            torch.where(self.valid, x, math.inf) for x in by_token
        )
        return self


def everything(module, inputs, dtype, valid, config=SOME_CONFIG, out=None):
    """All that the passes return, from logits in `dtype`: by name."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    logits = inputs.logits.to(dtype)
    old, ref, advantages, weights, *grads = (
        x.to(kind) for x in (inputs.old, inputs.ref, inputs.advantages, inputs.weights, *inputs.grads)
    )
    of_logits = (logits, inputs.targets, valid)
    out_dtype = logits.dtype if out is None else out
    gradient, by_loss = (torch.empty(logits.shape, dtype=out_dtype) for _ in range(2))
    logps, lse, entropy = module.logits_logprobs(*of_logits, *inputs.scaling, True)
    # Of one LSE and entropy, rounded to fp32, so that only the gradient's own error is seen.
    exact = reference.logits_logprobs(inputs.logits.double(), inputs.targets, valid, *inputs.scaling, True)
    module.logits_gradient(*of_logits, *(x.float().to(kind) for x in exact[1:]), *grads, *inputs.scaling, gradient)
    found = module.logits_loss(*of_logits, old, advantages, ref, weights, *inputs.scaling, config, by_loss)
    for one, other in zip(found, (logps, entropy), strict=True):
        assert torch.equal(one.nan_to_num(nan=0.5), other.nan_to_num(nan=0.5))
    return {"logps": logps, "lse": lse, "entropy": entropy, "gradient": gradient, "by_loss": by_loss}


def assert_within_the_budget(inputs, valid=None, config=SOME_CONFIG, out=None):
    found = everything(native, inputs, inputs.logits.dtype, valid, config, out)
    same_dtype = everything(reference, inputs, inputs.logits.dtype, valid, config, out)
    exact = everything(reference, inputs, torch.float64, valid, config)
    for name, value in found.items():
        assert value.dtype == same_dtype[name].dtype
        assert_error_budget(name, value, same_dtype[name], exact[name])
        if valid is not None:
            assert (value[~valid] == 0).all()
    return found


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_every_pass(vocabulary, dtype, scaling):
    inputs = Inputs((3, 2, vocabulary), dtype, scaling)
    assert_within_the_budget(inputs)
    inputs.valid[0] = torch.tensor([True, False])
    assert_within_the_budget(inputs.poisoned(), inputs.valid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [50257, 151936])  # GPT-2, odd; Qwen
def test_vocabularies_of_models(vocabulary, dtype):
    assert_within_the_budget(Inputs((1, 2, vocabulary), dtype))


@pytest.mark.parametrize("config", TOKEN_CONFIGS, ids=config_id)
def test_every_option_of_the_loss(config):
    """Log-probs of a few units: a ratio makes their last digit one of the gradient's, times the ratio and advantage."""
    assert_within_the_budget(Inputs((2, 3, 9), spread=1.0), config=config)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_the_gradient(dtype, out):
    assert_within_the_budget(Inputs((2, 3, 77), dtype), out=out)


@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_gradients_left_out_are_zeros(absent):
    """Of logps, entropy and LSE."""
    inputs = Inputs((2, 3, 33))
    _, lse, entropy = native.logits_logprobs(inputs.logits, inputs.targets, None, 1.0, None, True)
    results = []
    for nothing in (None, torch.zeros(2, 3)):
        grads = [nothing if i in absent else grad for i, grad in enumerate(inputs.grads)]
        out = torch.empty_like(inputs.logits)
        native.logits_gradient(inputs.logits, inputs.targets, None, lse, entropy, *grads, 1.0, None, out)
        results.append(out)
    torch.testing.assert_close(*results)
    assert results[0].any()


def test_optional_arguments_left_out():
    inputs = Inputs((2, 3, 33))
    of_logits = (inputs.logits, inputs.targets, None)
    logps, lse, entropy = native.logits_logprobs(*of_logits, 1.0, None, False)
    expected = native.logits_logprobs(*of_logits, 1.0, None, True)
    assert entropy is None
    assert torch.equal(logps, expected[0])
    assert torch.equal(lse, expected[1])
    found, wanted = torch.empty(2, 2, 3, 33)
    native.logits_loss(*of_logits, None, inputs.advantages, None, None, 1.0, None, SOME_CONFIG, found)
    reference.logits_loss(*of_logits, None, inputs.advantages, None, None, 1.0, None, SOME_CONFIG, wanted)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
@pytest.mark.parametrize("vocabulary", [9, 5001])  # inside a block, and over several
def test_in_place_is_out_of_place_bit_for_bit(vocabulary, dtype, scaling):
    inputs = Inputs((2, 2, vocabulary), dtype, scaling)
    apart = everything(native, inputs, dtype, None)
    inside = inputs.logits.clone()
    by_token = (inputs.old, inputs.advantages, inputs.ref, inputs.weights)
    logps, _ = native.logits_loss(
        inside, inputs.targets, None, *by_token, *scaling, SOME_CONFIG, inside.view_as(inside)
    )
    assert torch.equal(inside, apart["by_loss"])
    assert torch.equal(logps, apart["logps"])
    inside = inputs.logits.clone()
    _, lse, entropy = reference.logits_logprobs(inside.double(), inputs.targets, None, *scaling, True)
    native.logits_gradient(inside, inputs.targets, None, lse.float(), entropy.float(), *inputs.grads, *scaling, inside)
    assert torch.equal(inside, apart["gradient"])


def views(values, kind):
    """The same numbers (A, B, C) at other strides; what lies between must not be read."""
    between = {torch.bool: True, torch.int64: -100}.get(values.dtype, math.nan)
    if kind == "transposed":
        return values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if kind == "stepped":
        wide = torch.full((values.shape[0], 2 * values.shape[1], 3 * values.shape[2]), between, dtype=values.dtype)
        wide[:, ::2, ::3] = values
        return wide[:, ::2, ::3]
    if kind == "misaligned":
        flat = torch.full((values.numel() + 1,), between, dtype=values.dtype)
        flat[1:] = values.flatten()
        return flat[1:].view(values.shape)
    if kind == "broadcast":
        return values[:1, :1].expand(values.shape)
    return values.clone()


KINDS = ["plain", "transposed", "stepped", "misaligned", "broadcast"]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 70)),
    st.sampled_from(DTYPES),
    st.sampled_from([PLAIN, SCALED]),
    st.tuples(*[st.sampled_from(KINDS)] * 3),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape_and_stride(shape, dtype, scaling, kinds, masked, seed):
    torch.manual_seed(seed)
    inputs = Inputs(shape, dtype, scaling)
    inputs.logits = views(inputs.logits, kinds[0])
    inputs.targets = views(inputs.targets[..., None], kinds[1])[..., 0]
    inputs.valid = views(inputs.valid[..., None], kinds[2])[..., 0]
    inputs.old, inputs.ref, inputs.advantages, inputs.weights = (
        views(x[..., None], kinds[2])[..., 0] for x in (inputs.old, inputs.ref, inputs.advantages, inputs.weights)
    )
    # Of logits broadcast afterwards: keeps ratios from overflowing.
    inputs.old = inputs.old.clamp(-9.0, 0.0)
    valid = inputs.valid if masked else None
    found = everything(native, inputs, dtype, valid)
    expected = everything(reference, inputs, dtype, valid)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")
    if kinds[0] != "broadcast" and shape[0] and shape[1]:
        out = inputs.logits
        by_token = (inputs.old, inputs.advantages, inputs.ref, inputs.weights)
        native.logits_loss(out, inputs.targets, valid, *by_token, *scaling, SOME_CONFIG, out)
        assert torch.equal(out, found["by_loss"])
        if kinds[0] == "stepped":  # nothing beside the rows is written
            storage = out.untyped_storage()
            whole = out.new_empty(0).set_(storage, 0, (storage.nbytes() // out.itemsize,))
            assert whole.isnan().sum() == whole.numel() - out.numel()


def kl_of(p, q, scaling):
    log_p, log_q = (
        (x if scaling.softcap is None else scaling.softcap * torch.tanh(x / scaling.softcap)) / scaling.temperature
        for x in (p, q)
    )
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
@pytest.mark.parametrize("vocabulary", [*SIZES, 50257])
def test_divergence(vocabulary, dtype, scaling):
    p = (2 * torch.randn(5, vocabulary)).to(dtype)
    q = (p + 0.5 * torch.randn(5, vocabulary)).to(dtype)
    exact = kl_of(p.double(), q.double(), scaling)
    same_dtype = reference.logits_kl(p, q, *scaling)
    found = native.logits_kl(p, q, *scaling)
    assert (found >= 0).all()
    assert_error_budget("kl", found, same_dtype, exact)
    assert torch.equal(found, native.logits_kl(p.t().contiguous().t(), q[:, :].clone(), *scaling))


def test_divergence_of_forbidden_tokens():
    p, q = torch.randn(2, 4, 40).unbind()
    p[0, 3] = p[1, 3] = q[0, 3] = q[2, 3] = -math.inf
    q[3, 3] = math.nan
    found, expected = native.logits_kl(p, q, 1.0, None), kl_of(p.double(), q.double(), PLAIN).float()
    assert found[2] == math.inf
    assert found[3].isnan()
    torch.testing.assert_close(found[:2], expected[:2])
    assert native.logits_kl(p[:0], q[:0], 1.0, None).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_forbidden_tokens(dtype, softcap):
    """Logits of -inf: some, whole blocks at either end, all but the target."""
    inputs = Inputs((1, 4, 5003), dtype, Scaling(0.8, softcap))
    inputs.targets = torch.tensor([[1, 5000, 3, 77]])
    inputs.logits[0, 0, ::2] = -math.inf
    inputs.logits[0, 1, :4500] = -math.inf
    inputs.logits[0, 2, 100:] = -math.inf
    inputs.logits[0, 3] = -math.inf
    inputs.logits[0, 3, 77] = -3.0
    found = assert_within_the_budget(inputs)
    if softcap is None:
        assert (found["gradient"][inputs.logits == -math.inf] == 0).all()


def test_huge_logits():
    inputs = Inputs((1, 4, 300))
    inputs.logits[0, 0, 9] = 1e30
    inputs.logits[0, 1, 9] = -1e30
    inputs.logits[0, 2, ::3] = 1e30
    inputs.logits[0, 3] = -1e30
    inputs.old = inputs.ref = torch.full((1, 4), -2.0)
    inputs.targets = torch.tensor([[9, 2, 3, 4]])
    for token in range(4):
        of = slice(token, token + 1)
        logits, targets = inputs.logits[:, of], inputs.targets[:, of]
        exact = reference.logits_logprobs(logits.double(), targets, None, 1.0, None, True)
        found = native.logits_logprobs(logits, targets, None, 1.0, None, True)
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other.float())


@pytest.mark.parametrize("place", [0, 20, 4999])
def test_a_nan_shows_and_spoils_its_own_row_only(place):
    inputs = Inputs((1, 3, 5000))
    clean = everything(native, inputs, torch.float32, None)
    inputs.logits[0, 1, place] = math.nan
    dirty = everything(native, inputs, torch.float32, None)
    for name, value in dirty.items():
        assert value[0, 1].isnan().any(), name
        assert torch.equal(value[0, ::2], clean[name][0, ::2])
    for name in ("logps", "lse", "entropy", "by_loss"):
        assert dirty[name][0, 1].isnan().all(), name


def test_a_forbidden_target_and_a_row_of_nothing():
    values = torch.randn(1, 2, 40)
    values[0, 0, 3] = values[0, 1] = -math.inf
    logps, lse, entropy = native.logits_logprobs(values, torch.tensor([[3, 3]]), None, 1.0, None, True)
    assert logps[0, 0] == -math.inf
    assert lse[0, 1] == -math.inf  # as torch.logsumexp
    assert logps[0, 1].isnan()
    assert entropy[0, 1].isnan()
    torch.testing.assert_close(lse[0, 0], values[0, 0].logsumexp(-1))


@pytest.mark.parametrize("margin", [1.0, 9.0, 14.0])
def test_targets_of_probability_near_0_and_1(margin):
    """Logits around 20, where an LSE would cancel against the target's logit. Apart: sure ones have smaller errors."""
    inputs = Inputs((1, 6, 20011))
    inputs.logits = 20 + torch.randn(1, 6, 20011)
    inputs.logits[..., 7] = inputs.logits.amax(-1) + margin
    inputs.old = inputs.ref = torch.zeros(1, 6)
    for token in (7, 8):
        inputs.targets = torch.full((1, 6), token)
        assert_within_the_budget(inputs, config=PolicyLossConfig())


@pytest.mark.parametrize("token", [-1, -(2**40), 33, 2**31, 2**32 + 5])
def test_a_target_out_of_range_is_nan_and_nothing_else(token):
    inputs = Inputs((1, 3, 33))
    expected = everything(native, inputs, torch.float32, None)
    inputs.targets[0, 1] = token
    logps, lse, entropy = native.logits_logprobs(inputs.logits, inputs.targets, None, 1.0, None, True)
    assert logps.isnan().tolist() == [[False, True, False]]
    assert torch.equal(lse, expected["lse"])
    assert torch.equal(entropy, expected["entropy"])
    out = torch.empty_like(inputs.logits)
    by_token = (inputs.old, inputs.advantages, inputs.ref, inputs.weights)
    native.logits_loss(inputs.logits, inputs.targets, None, *by_token, 1.0, None, SOME_CONFIG, out)
    assert torch.equal(out[0, ::2], expected["by_loss"][0, ::2])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_with_any_number_of_threads(threads):
    inputs = Inputs((7, 5, 30011), torch.float16)
    p, q = inputs.logits[:2].flatten(0, 1), inputs.logits[2:4].flatten(0, 1)
    results = []
    for count in (1, 2, 5):
        threads(count)
        found = everything(native, inputs, torch.float16, inputs.valid)
        results.append([*found.values(), native.logits_kl(p, q, 1.0, None)])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


def test_no_valid_row_and_no_rows():
    inputs = Inputs((2, 3, 9))
    inputs.valid = ragged_mask([0, 0], 3)
    found = everything(native, inputs.poisoned(), torch.float32, inputs.valid)
    for value in found.values():
        assert (value == 0).all()
