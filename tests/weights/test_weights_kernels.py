"""The Triton kernels against the plain torch weights, the operator's contract, and rows that are no numbers."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vgpo_kernels import VGPOConfig, VGPOWeights, vgpo_weights
from vgpo_kernels.testing import assert_error_budget, ragged_mask
from vgpo_kernels.weights import ops
from vgpo_kernels.weights import triton as kernels

RECIPES = ["paper", "balanced"]
CUT = {"trajectory_score": "normalized_sum", "token_clamp": (0.1, 2.0), "trajectory_clamp": (0.9, 2.0)}
# 600 columns: more than one tile of 512, and no multiple of anything; a row that ends with the first tile.
LENGTHS, WIDTH = [600, 1, 512, 0, 33], 600
GROUPS = [9, 9, -1, 9, 9]
QUIET = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def batch(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    focus = (torch.rand(len(LENGTHS), WIDTH, generator=generator) * 1.6 - 0.6).to(dtype)
    return focus.to(device), ragged_mask(LENGTHS, WIDTH).to(device), torch.tensor(GROUPS, device=device)


def assert_kernels_match(focus, mask, group_ids, config, **options):
    found = vgpo_weights(focus, mask, group_ids, config, impl="triton", **options)
    same = vgpo_weights(focus, mask, group_ids, config, impl="reference", **options)
    exact = vgpo_weights(focus.double(), mask, group_ids, config, impl="reference", **options)
    assert torch.equal(found.gate, exact.gate)
    for name in ("token_weights", "trajectory_weights", "normalized", "score"):
        assert_error_budget(name, getattr(found, name), getattr(same, name), getattr(exact, name))
    return found


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        *((recipe, torch.float32) for recipe in RECIPES),
        ("balanced", torch.float16),
        ("paper", torch.bfloat16),
    ],
)
def test_kernels_match_the_reference(recipe, dtype, device):
    assert_kernels_match(*batch(device, dtype), VGPOConfig.from_recipe(recipe))


@pytest.mark.parametrize(
    ("recipe", "fields", "options"),
    [
        ("paper", {"schedule": "exponential", "exponent": 1.5}, {}),
        ("paper", {"schedule": "step", "step_position": 0.6, **CUT}, {"source": "attention"}),
        ("paper", {"gate": False, "trajectory_score": "normalized_mean"}, {"source": "attention"}),
        ("balanced", {"compensation": False}, {}),
        ("balanced", {"intra": False, "trajectory_clamp": (0.9, 1.05)}, {}),
        ("balanced", {"inter": False, "token_clamp": (0.8, 1.2)}, {}),
        ("paper", {"negative_strength": 0.25, "warmup_steps": 8, **CUT}, {"step": 6}),
    ],
)
def test_every_option_matches_the_reference(recipe, fields, options, device):
    focus, mask, group_ids = (x[:, :90] if x.dim() == 2 else x for x in batch(device))  # a tile cut short
    sees = torch.tensor([True, True, True, True, False], device=device)
    advantages = torch.tensor([1.0, -1.0, -2.0, 0.0, -0.5], device=device)
    config = VGPOConfig.from_recipe(recipe, **fields)
    assert_kernels_match(focus.abs(), mask, group_ids, config, has_visual=sees, advantages=advantages, **options)


@pytest.mark.usefixtures("gpu_arithmetic")
@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_powers_and_divisions_of_a_gpu(schedule):
    focus, mask, group_ids = (x[:, :90] if x.dim() == 2 else x for x in batch("cpu"))
    assert_kernels_match(focus, mask, group_ids, VGPOConfig.from_recipe("paper", schedule=schedule))


def test_projected_weights_of_a_long_row_have_mean_one(device):
    # 1100 columns: three tiles. Most scores near the top, so that the lower bound cuts.
    focus = torch.rand(2, 1100, device=device) ** 0.05
    mask = torch.ones_like(focus)
    config = VGPOConfig.balanced(token_clamp=(0.7, 1.1))
    w = assert_kernels_match(focus, mask, torch.zeros(2, dtype=torch.int64, device=device), config)
    assert w.token_weights.min() == torch.tensor(0.7)
    assert w.token_weights.max() == torch.tensor(1.1)
    torch.testing.assert_close(w.token_weights.mean(1).cpu(), torch.ones(2), rtol=0, atol=1e-6)


def tail_thresholds(focus, count, kappa):
    tail = focus[:, count - count // 2 :]
    top = max(1, int(tail.shape[1] * kappa))
    return tail, torch.topk(tail, top, dim=1).values[:, -1:]


HARD = {
    "ties": torch.tensor([0.5, 0.25, 0.5, 0.125]),
    "both zeros": torch.tensor([0.0, -0.0, -1e-3, -0.0]),
    "denormals": torch.tensor([1e-45, -1e-45, 0.0, 3e-42]),
    "neighbours": torch.tensor([0.5, math.nextafter(0.5, 1), 0.5 + 2**-24, 0.5 - 2**-25]).float(),
    "wide": torch.tensor([-3e38, 3e38, 1e-38, -1e-38]),
}


@QUIET
@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("values", HARD)
def test_the_gate_finds_the_kth_largest_exactly(values, kappa, impl, device):
    generator = torch.Generator().manual_seed(3)
    count = 74  # an even row: a tail of 37, its top ten or so
    focus = HARD[values][torch.randint(4, (1, count), generator=generator)]
    tail, threshold = tail_thresholds(focus, count, kappa)
    group_ids = torch.zeros(1, dtype=torch.int64)
    config = VGPOConfig.paper(kappa=kappa)
    w = vgpo_weights(focus.to(device), torch.ones(1, count, device=device), group_ids.to(device), config, impl=impl)
    assert torch.equal(w.gate[:, count // 2 :].cpu(), tail >= threshold)
    assert not w.gate[:, : count // 2].any()


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize(
    ("kappa", "exact", "float64"),
    [
        (0.29, 29, 28),  # 100 * 0.29 is below 29 in float64
        (0.57, 57, 56),  # and 100 * 0.57 below 57
        (1.0, 100, 100),
    ],
)
def test_the_gate_opens_for_as_many_as_decimals_say(kappa, exact, float64, impl, device):
    focus = torch.randperm(200, generator=torch.Generator().manual_seed(5))[None].to(device) / 200
    group_ids = torch.zeros(1, dtype=torch.int64, device=device)
    for config, opened in (
        (VGPOConfig.paper(kappa=kappa), exact),
        (VGPOConfig.balanced(kappa=kappa), exact),
        (VGPOConfig.paper(kappa=kappa, tail_rounding="float64"), float64),
    ):
        w = vgpo_weights(focus, torch.ones_like(focus), group_ids, config, impl=impl)
        assert w.gate.sum() == opened


def test_any_length_runs_through_the_same_kernel(device):
    count = 20_002  # 40 tiles
    focus = torch.rand(1, count, device=device)
    w = assert_kernels_match(
        focus, torch.ones_like(focus), torch.zeros(1, dtype=torch.int64, device=device), VGPOConfig.paper()
    )
    assert w.gate.sum() == int(count // 2 * 0.2)


@QUIET
@pytest.mark.parametrize(
    ("recipe", "value"),
    [("paper", float("inf")), ("balanced", float("nan"))],
)
def test_a_row_that_is_no_number_stays_alone(recipe, value, device):
    focus, mask, group_ids = (x[:, :40] if x.dim() == 2 else x for x in batch(device))
    group_ids = torch.zeros_like(group_ids)
    config = VGPOConfig.from_recipe(recipe)
    bad = focus.clone()
    bad[2, 17] = value
    kept = [0, 1, 3, 4]
    w = vgpo_weights(bad, mask, group_ids, config, impl="triton")
    alone = vgpo_weights(focus[kept], mask[kept], group_ids[kept], config, impl="triton")
    assert w.token_weights[2].isnan().all()
    assert w.normalized[2].isnan().all()
    assert w.trajectory_weights[2].isnan()
    assert w.score[2].isnan()
    for name, others in zip(VGPOWeights._fields, alone, strict=True):
        torch.testing.assert_close(getattr(w, name)[kept], others, rtol=0, atol=0, msg=name)


def test_strided_inputs_are_read_in_place(device):
    focus, mask, group_ids = (x[..., :50] if x.dim() == 2 else x for x in batch(device))
    config = VGPOConfig.balanced(negative_strength=0.5)
    advantages = torch.tensor([1.0, -1.0, -2.0, 0.0, -0.5], device=device)
    sees = torch.tensor([True, True, False, True, True], device=device)

    def spread(x):
        return torch.stack([x, x], dim=-1)[..., 0]

    def turned(x):
        return x.t().contiguous().t()

    plain = vgpo_weights(focus, mask, group_ids, config, has_visual=sees, advantages=advantages, impl="triton")
    strided = vgpo_weights(
        turned(focus),
        spread(mask),
        spread(group_ids),
        config,
        has_visual=spread(sees),
        advantages=spread(advantages),
        impl="triton",
    )
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
def test_masks_and_groups_of_every_kind(impl, dtype, device):
    focus, mask, group_ids = (x[:3, :20] if x.dim() == 2 else x[:3] for x in batch(device))
    plain = vgpo_weights(focus, mask, group_ids, VGPOConfig.paper(), impl=impl)
    group_dtype = torch.int8 if dtype == torch.uint8 else torch.int32
    other = vgpo_weights(focus, mask.to(dtype), group_ids.to(group_dtype), VGPOConfig.paper(), impl=impl)
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES)
def test_at_most_two_launches(recipe, device, monkeypatch):
    launched = []
    for name in ("weights_token_kernel", "weights_group_kernel"):
        kernel = getattr(kernels, name)

        class Counted:
            def __getitem__(self, grid, kernel=kernel, name=name):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(kernels, name, Counted())
    focus, mask, group_ids = (x[:2, :9] if x.dim() == 2 else x[:2] for x in batch(device))
    vgpo_weights(focus, mask, group_ids, VGPOConfig.from_recipe(recipe), impl="triton")
    assert launched == ["weights_token_kernel", "weights_group_kernel"]


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
def test_opcheck(impl, device):
    focus, mask, group_ids = (x[:2, :9] if x.dim() == 2 else x[:2] for x in batch(device))
    config = VGPOConfig.balanced(negative_strength=0.5, warmup_steps=4)
    torch.library.opcheck(
        ops.weights,
        (focus, mask, group_ids, torch.tensor([True, False], device=device), torch.ones(2, device=device)),
        {"source": "similarity", "step": 1, "impl": impl, **vars(config)},
    )


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
def test_compiles_whole_and_once_for_all_lengths(impl, device):
    counter = CompileCounterWithBackend("aot_eager")
    config = VGPOConfig.balanced(warmup_steps=100)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def weigh(focus, mask, group_ids, step):
        return vgpo_weights(focus, mask, group_ids, config, step=step, impl=impl)

    compiled = []
    for length, step in ((31, 5), (47, 6), (64, 7)):
        focus, mask, group_ids = torch.rand(2, length), torch.ones(2, length), torch.tensor([4, 4])
        inputs = [x.to(device) for x in (focus, mask, group_ids)]
        eager = vgpo_weights(*inputs, config, step=step, impl=impl)
        for a, b in zip(weigh(*inputs, step), eager, strict=True):
            assert torch.equal(a, b)
        compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert compiled[1:] == compiled[:1] * 2
