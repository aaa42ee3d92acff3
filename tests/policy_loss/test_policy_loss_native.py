"""The CPU kernel of the policy loss against the reference, on every instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import assert_matches_reference, config_id, every_config, loss_and_gradient, random_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from vgpo_kernels import _native
from vgpo_kernels.policy_loss import PolicyLossConfig, native, reference
from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.policy_loss.ops import policy_loss as operator
from vgpo_kernels.policy_loss.terms import ROW_COLUMNS

SOME_CONFIGS = [
    PolicyLossConfig.official().replace(beta=0.1),
    PolicyLossConfig("grpo", "sequence", epsilon_high=0.28, delta=1.6, beta=0.1),
    PolicyLossConfig("cispo", "sequence", epsilon_high=1.2),
]
TENSORS = ("old_logps", "ref_logps", "token_weights", "trajectory_weights")

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("config", every_config(), ids=config_id)
def test_every_option(config):
    num_items = 9.0 if config.divides_by_num_items else None
    assert_matches_reference(random_inputs([37, 20], 37), config, "cpu", impl="native", num_items_in_batch=num_items)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        ([1], 1),  # the smallest batch
        ([1, 0, 1], 1),  # one column, one row of padding
        ([17, 16, 15], 17),  # around the sixteen lanes of the widest vector
        ([1024, 1000], 1024),  # exactly one piece of a row with sixteen lanes, four with four
        ([1025, 1024], 1025),  # one token in one more piece, once masked
        ([0, 3000], 3001),  # pieces that are all padding
        ([20_000, 7], 20_000),  # a row that is longer than a task's tokens
        ([b % 4 for b in range(6000)], 3),  # rows of several tasks, short ones
    ],
)
def test_sizes(lengths, length, config):
    assert_matches_reference(random_inputs(lengths, length), config, "cpu", impl="native")


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(config, dtype):
    assert_matches_reference(random_inputs([33, 20, 1], 33, dtype=dtype), config, "cpu", impl="native")


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
def test_inputs_of_different_dtypes(config):
    inputs = random_inputs([33, 20], 33)
    inputs = inputs.replace(
        old_logps=inputs.old_logps.double(),
        ref_logps=inputs.ref_logps.bfloat16(),
        token_weights=inputs.token_weights.half(),
        trajectory_weights=inputs.trajectory_weights.double(),
    )
    assert_matches_reference(inputs, config, "cpu", impl="native")


@settings(max_examples=120, deadline=None)
@given(
    config=st.sampled_from(every_config()),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    length=st.integers(70, 75),
    present=st.tuples(*[st.booleans()] * 4),
    layouts=st.lists(st.sampled_from(["plain", "turned", "spread", "shifted", "widened"]), min_size=7, max_size=7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_stride_with_any_arguments(config, lengths, length, present, layouts, dtype, seed):
    torch.manual_seed(seed)
    inputs = random_inputs(lengths, length, dtype=dtype)
    absent = [name for name, keep in zip(TENSORS, present, strict=True) if not keep]
    if config.beta:
        absent = [name for name in absent if name != "ref_logps"]
    inputs = inputs.replace(**dict.fromkeys(absent))
    order = iter(layouts)
    views = inputs.map(lambda x: laid_out(x, next(order)))
    assert_matches_reference(
        views.replace(completion_mask=laid_out(inputs.completion_mask, next(order))), config, "cpu", impl="native"
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides; what lies between them is NaN, for a mask True."""
    fill = math.nan if x.is_floating_point() else True
    if layout == "turned":
        return x.t().contiguous().t()
    if layout == "spread":
        return torch.stack([x, torch.full_like(x, fill)], dim=-1)[..., 0]
    if layout == "shifted":
        return torch.cat([x.new_full((1,), fill), x.flatten()])[1:].view(x.shape)
    if layout == "widened":
        return torch.cat([x, torch.full_like(x, fill)], dim=-1)[..., : x.shape[-1]]
    return x


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
def test_one_value_for_all_tokens_or_rows(config):
    """Strides of 0."""
    inputs = random_inputs([33, 20, 5], 33)
    views = inputs.map(lambda x: x[..., :1].expand(x.shape))
    views = views.replace(old_logps=inputs.old_logps[:1].expand(inputs.old_logps.shape))
    assert_matches_reference(views, config, "cpu", impl="native")


@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int64, torch.float32])
def test_every_kind_of_mask(mask_dtype):
    inputs = random_inputs([7, 4], 7)
    changed = inputs.replace(completion_mask=inputs.completion_mask.to(mask_dtype))
    expected = inputs.call(SOME_CONFIGS[0], impl="native")
    assert torch.equal(changed.call(SOME_CONFIGS[0], impl="native").loss, expected.loss)


def test_a_mask_of_other_values_is_refused():
    inputs = random_inputs([3, 2], 3)
    inputs = inputs.replace(completion_mask=torch.full((2, 3), 2))
    with pytest.raises(ValueError, match="completion_mask: expected 0 or 1, got 2 at row 0, position 0"):
        inputs.call(PolicyLossConfig(), impl="native")


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_change_nothing(garbage, config):
    inputs = random_inputs([39, 0, 25], 39)
    keep = inputs.completion_mask
    output, gradient = loss_and_gradient(inputs, config, impl="native")
    dirty = inputs.map(
        lambda x: torch.where(keep if x.dim() == 2 else keep.any(1), x, torch.full_like(x, garbage)),
    )
    dirty_output, dirty_gradient = loss_and_gradient(dirty, config, impl="native")
    assert torch.equal(dirty_output.loss, output.loss)
    assert torch.equal(dirty_output.per_token_loss, output.per_token_loss)
    assert torch.equal(dirty_gradient, gradient)
    assert dirty_output.metrics == output.metrics


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("config", every_config()[::9], ids=config_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logps", "old_logps", "ref_logps", "advantages"])
def test_what_is_no_number_at_a_valid_token_shows_as_in_the_reference(name, value, config):
    inputs = random_inputs([19, 19], 19)
    changed = getattr(inputs, name).clone()
    changed[0, 3] = value
    inputs = inputs.replace(**{name: changed})
    output, gradient = loss_and_gradient(inputs, config, impl="native")
    expected, expected_gradient = loss_and_gradient(inputs, config, impl="reference")
    torch.testing.assert_close(output.per_token_loss, expected.per_token_loss, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)
    torch.testing.assert_close(output.loss, expected.loss, equal_nan=True)
    torch.testing.assert_close(output.metrics, expected.metrics, equal_nan=True)


@pytest.mark.parametrize("config", every_config()[::9], ids=config_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_so_it_does_without_old_logps(value, config):
    """Its ratio is 1 and not to be computed, but a logp that is no number must not vanish in it."""
    inputs = random_inputs([19, 19], 19).replace(old_logps=None)
    inputs.logps[0, 3] = value
    output, gradient = loss_and_gradient(inputs, config, impl="native")
    expected, expected_gradient = loss_and_gradient(inputs, config, impl="reference")
    torch.testing.assert_close(output.per_token_loss, expected.per_token_loss, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)
    torch.testing.assert_close(output.loss, expected.loss, equal_nan=True)
    torch.testing.assert_close(output.metrics, expected.metrics, equal_nan=True)


@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
def test_same_bits_on_any_number_of_threads(config):
    inputs = random_inputs([b % 900 for b in range(90)], 900)  # 81,000 tokens: five tasks
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(loss_and_gradient(inputs, config, impl="native"))
    finally:
        torch.set_num_threads(before)
    for output, gradient in found[1:]:
        assert torch.equal(output.loss, found[0][0].loss)
        assert torch.equal(output.per_token_loss, found[0][0].per_token_loss)
        assert torch.equal(gradient, found[0][1])
        assert output.metrics == found[0][0].metrics


def test_outputs_are_those_of_the_reference():
    inputs = random_inputs([5, 2], 5, dtype=torch.bfloat16)
    logps, *constants = inputs.__dict__.values()
    arguments = (logps, LossInputs(*constants), SOME_CONFIGS[0])
    for found, expected in zip(native.policy_loss(*arguments), reference.policy_loss(*arguments), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_opcheck():
    inputs = random_inputs([5, 3], 5)
    torch.library.opcheck(operator, (*inputs.__dict__.values(), None), {"impl": "native", **SOME_CONFIGS[0].settings()})


def test_compiles_whole():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(inputs):
        return inputs.call(SOME_CONFIGS[1], impl="native").loss

    inputs = random_inputs([9, 5], 9)
    expected, expected_gradient = loss_and_gradient(inputs, SOME_CONFIGS[1], impl="native")
    logps = inputs.logps.clone().requires_grad_()
    loss = step(inputs.replace(logps=logps))
    loss.backward()
    assert counter.frame_count == 1
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logps.grad, expected_gradient)


def arguments(**changes):
    """Those of the kernel, for 2 rows of 3 tokens."""
    two, one = torch.zeros(2, 3), torch.zeros(2)
    given = {
        **{"loss": two.clone(), "gradient": two.clone(), "rows": torch.zeros(2, ROW_COLUMNS), "logps": two},
        **{"old": two, "advantages": two, "mask": two.bool(), "ref": two, "token_weights": two},
        **{"trajectory_weights": one, "settings": native.settings(PolicyLossConfig())},
        **{"sequence": False, "row_mean": False},
    }
    return (given | changes).values()


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("name", ["loss", "gradient", "rows", "old", "advantages", "mask", "ref", "token_weights"])
def test_the_kernel_refuses_wrong_sizes(name):
    dtype = torch.bool if name == "mask" else torch.float32
    for shape in ((2, 4), (3, 3), (0, 3), (2, 0)):
        with pytest.raises(ValueError, match=f"{name}: expected size"):
            _native.call("policy_loss", *arguments(**{name: torch.zeros(shape, dtype=dtype)}))


def test_the_kernel_refuses_what_is_no_argument():
    with pytest.raises(ValueError, match="trajectory_weights: expected size 2"):
        _native.call("policy_loss", *arguments(trajectory_weights=torch.zeros(3)))
    with pytest.raises(ValueError, match="settings: expected size 8"):
        _native.call("policy_loss", *arguments(settings=torch.zeros(6).double()))
    with pytest.raises(TypeError, match="argument 10: expected a tensor of another dtype"):
        _native.call("policy_loss", *arguments(settings=torch.zeros(7)))
    with pytest.raises(TypeError, match="argument 3: expected a tensor of 2 dimensions"):
        _native.call("policy_loss", *arguments(logps=torch.zeros(2)))
    with pytest.raises(TypeError, match="argument 6: expected a tensor of another dtype"):
        _native.call("policy_loss", *arguments(mask=torch.zeros(2, 3)))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_the_kernel_takes_empty_tensors(shape):
    empty, rows = torch.zeros(shape), torch.full((shape[0], ROW_COLUMNS), math.nan)
    changes = dict.fromkeys(("loss", "gradient", "logps", "old", "advantages", "ref", "token_weights"), empty)
    changes |= {"rows": rows, "mask": empty.bool(), "trajectory_weights": torch.zeros(shape[0]), "sequence": True}
    _native.call("policy_loss", *arguments(**changes))
    assert (rows == 0).all()
