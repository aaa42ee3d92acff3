"""The plain torch weights against an independent float64 transcription, and every defined corner."""

import pytest
import torch
from transcribed_weights import weights as transcribed

from vgpo_kernels import VGPOConfig, VGPOWeights, vgpo_weights
from vgpo_kernels.testing import ragged_mask

IMPLS = ["reference", "triton", "native"]
# 37 columns: no multiple of a vector width; a full row, a single token, an empty row, odd and even tails.
LENGTHS, WIDTH = [37, 1, 0, 5, 22, 36, 17, 30], 37
GROUPS = [40, -3, 40, -3, 40, -3, -3, 40]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    focus = torch.rand(len(LENGTHS), WIDTH, generator=generator) * 1.6 - 0.6
    return focus, ragged_mask(LENGTHS, WIDTH), torch.tensor(GROUPS)


def assert_matches(found: VGPOWeights, expected, atol):
    for name, value, exact in zip(VGPOWeights._fields, found, expected, strict=True):
        torch.testing.assert_close(
            value.double(),
            torch.as_tensor(exact).double(),
            rtol=0,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


CHANGES = {
    "as shipped": {},
    "exponential": {"schedule": "exponential", "exponent": 1.5},
    "step at the last token": {"schedule": "step", "step_position": 1.0},
    "step in the middle": {"schedule": "step", "step_position": 0.6},
    "no gate": {"gate": False},
    "no compensation": {"compensation": False},
    "no token weights": {"intra": False},
    "no trajectory weights": {"inter": False},
    "narrow clamps": {"token_clamp": (0.8, 1.3), "trajectory_clamp": (0.7, 1.1)},
    "narrow clamps, mean kept": {
        "token_clamp": (0.8, 1.3),
        "trajectory_clamp": (0.7, 1.1),
        "preserve_mean": True,
    },
    "no tail": {"gamma": 0.0},
    "all tail, all gated": {"gamma": 1.0, "kappa": 1.0},
    "one gated token": {"kappa": 0.0},
    "an odd share": {"gamma": 0.71, "kappa": 0.29},
    "mean of normalized": {"trajectory_score": "normalized_mean"},
    "other positions": {"position": "zero_based"},
    "runs as groups": {"grouping": "consecutive"},
}


@pytest.mark.parametrize("source", ["similarity", "attention"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recipe", ["paper", "official", "balanced"])
def test_reference_is_the_formula_in_float64(recipe, change, source):
    focus, mask, group_ids = batch()
    focus = focus.double()
    focus = focus.abs() / 2 if source == "attention" else focus
    sees = torch.tensor([True, True, True, True, False, True, True, True])
    config = VGPOConfig.from_recipe(recipe, **CHANGES[change])
    found = vgpo_weights(focus, mask, group_ids, config, source=source, has_visual=sees)
    assert found.token_weights.dtype == torch.float64
    assert_matches(found, transcribed(focus, mask, group_ids, config, source, sees), atol=1e-12)


@pytest.mark.parametrize("recipe", ["paper", "official", "balanced"])
def test_strength_on_negative_advantages_and_warm_up_come_last(recipe):
    focus, mask, group_ids = batch()
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, -2.0, 1.0, -1.0])
    config = VGPOConfig.from_recipe(recipe, negative_strength=0.25, warmup_steps=8)
    for step, warmup in ((0, 0.0), (2, 0.25), (8, 1.0), (9, 1.0)):
        found = vgpo_weights(focus.double(), mask, group_ids, config, step=step, advantages=advantages)
        expected = transcribed(focus, mask, group_ids, config, advantages=advantages, warmup=warmup)
        assert_matches(found, expected, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_outputs_are_detached_float32(impl, device):
    focus, mask, group_ids = (x.to(device) for x in batch())
    w = vgpo_weights(focus[:2].requires_grad_(), mask[:2], group_ids[:2], VGPOConfig.balanced(), impl=impl)
    assert [x.dtype for x in w] == [torch.float32] * 3 + [torch.bool, torch.float32]
    assert not any(x.requires_grad for x in w)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recipe", ["paper", "balanced"])
class TestCorners:
    """Where a formula has no meaning the factor is 1: exactly, so the tests compare for equality."""

    def weigh(self, recipe, impl, device, focus, mask=None, groups=None, **options):
        mask = torch.ones_like(focus) if mask is None else mask
        groups = torch.zeros(len(focus), dtype=torch.int64) if groups is None else groups
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        config = VGPOConfig.from_recipe(recipe)
        return vgpo_weights(focus.to(device), mask.to(device), groups.to(device), config, impl=impl, **options)

    def test_one_valid_token(self, recipe, impl, device):
        w = self.weigh(recipe, impl, device, torch.tensor([[0.3, 9.0], [0.1, 0.5]]), torch.tensor([[1, 0], [1, 1]]))
        assert w.token_weights[0].tolist() == [1.0, 1.0]
        assert w.trajectory_weights.mean().item() == pytest.approx(1.0)
        assert w.trajectory_weights[0] != 1

    def test_constant_focus(self, recipe, impl, device):
        # The gate opens for all of the tail, so the compensated scores are not constant.
        w = self.weigh(recipe, impl, device, torch.full((2, 9), 0.3))
        assert w.gate.sum() == 10
        assert (w.token_weights == 1).all()
        assert (w.normalized == 0).all()
        assert (w.trajectory_weights == 1).all()

    def test_group_of_one(self, recipe, impl, device):
        w = self.weigh(recipe, impl, device, torch.rand(3, 8), groups=torch.tensor([5, 2, 9]))
        assert (w.trajectory_weights == 1).all()
        assert (w.token_weights != 1).any()

    def test_all_masked_row(self, recipe, impl, device):
        focus = torch.rand(3, 8)
        mask = torch.tensor([[1] * 8, [0] * 8, [1] * 8])
        w = self.weigh(recipe, impl, device, focus, mask)
        alone = self.weigh(recipe, impl, device, focus[::2], mask[::2])
        assert (w.token_weights[1] == 1).all()
        assert w.trajectory_weights[1] == 1
        assert w.score[1] == 0
        assert torch.equal(w.trajectory_weights[::2], alone.trajectory_weights)

    def test_row_without_visual_token(self, recipe, impl, device):
        focus = torch.rand(3, 8)
        focus[1] = float("nan")  # never read
        w = self.weigh(recipe, impl, device, focus, has_visual=torch.tensor([True, False, True]))
        alone = self.weigh(recipe, impl, device, focus[::2])
        assert (w.token_weights[1] == 1).all()
        assert (w.normalized[1] == 0).all()
        assert not w.gate[1].any()
        assert w.trajectory_weights[1] == 1
        assert torch.equal(w.trajectory_weights[::2], alone.trajectory_weights)

    def test_focus_of_zero_at_every_token_means_no_visual_token_unless_told(self, recipe, impl, device):
        focus, mask = torch.rand(4, 8), torch.ones(4, 8)
        mask[2, 2:] = 0  # shorter, so that its sum of scores differs from that of row 1
        focus[1:3] = torch.where(mask[1:3] != 0, 0.0, float("nan"))  # never read at padding
        focus[3, 1:] = -0.0  # one token looks
        told = {"has_visual": torch.tensor([True, False, False, True])}
        w = self.weigh(recipe, impl, device, focus, mask)
        for found, expected in zip(w, self.weigh(recipe, impl, device, focus, mask, **told), strict=True):
            assert torch.equal(found, expected)
        assert (w.token_weights[1:3] == 1).all()
        assert (w.trajectory_weights[1:3] == 1).all()
        # Rows with an image that is never looked at.
        looked = self.weigh(recipe, impl, device, focus, mask, has_visual=torch.ones(4) > 0)
        assert (looked.trajectory_weights[1:3] != 1).all()

    def test_group_with_equal_scores(self, recipe, impl, device):
        # The same scores at other columns: their sums may differ in the last bit.
        row = torch.rand(13)
        focus, mask = torch.zeros(2, 1500), torch.zeros(2, 1500)
        focus[0, :13] = focus[1, 100:1400:100] = row
        mask[0, :13] = mask[1, 100:1400:100] = 1
        w = self.weigh(recipe, impl, device, focus, mask)
        assert w.trajectory_weights.tolist() == [1.0, 1.0]

    def test_padding_is_never_read(self, recipe, impl, device):
        focus, mask, group_ids = (x[1:5] for x in batch())
        dirty = focus.masked_fill(~mask, float("nan"))
        dirty[:, ::2] = torch.where(mask, focus, float("inf"))[:, ::2]
        clean = self.weigh(recipe, impl, device, focus, mask, group_ids)
        for a, b in zip(clean, self.weigh(recipe, impl, device, dirty, mask, group_ids), strict=True):
            assert torch.equal(a, b)
        outside = ~mask.to(device)
        assert (clean.token_weights[outside] == 1).all()
        assert (clean.normalized[outside] == 0).all()
        assert not clean.gate[outside].any()

    def test_left_padding_and_holes_are_skipped(self, recipe, impl, device):
        packed, holes = torch.rand(2, 20), torch.zeros(2, 41)
        mask = torch.zeros(2, 41)
        columns = torch.arange(3, 41)[torch.arange(38) % 2 == 0]  # 19 of them, behind padding of 3
        holes[:, columns] = packed[:, :19]
        mask[:, columns] = 1
        apart = self.weigh(recipe, impl, device, holes, mask)
        together = self.weigh(recipe, impl, device, packed[:, :19])
        for a, b in zip(apart[:1] + apart[2:4], together[:1] + together[2:4], strict=True):
            torch.testing.assert_close(a[:, columns], b, rtol=0, atol=1e-6)
        torch.testing.assert_close(apart.trajectory_weights, together.trajectory_weights, rtol=0, atol=1e-6)


def test_official_corners_follow_the_published_code(device):
    focus = torch.tensor([[0.4, 0.4, 0.4, 0.4], [-0.5, 0.1, 0.2, 0.5], [0.3, 0.9, 0.1, 0.2], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    sees = torch.tensor([True, True, True, False])
    inputs = [x.to(device) for x in (focus, mask, torch.zeros(4, dtype=torch.int64))]
    w = vgpo_weights(*inputs, VGPOConfig.official(), has_visual=sees.to(device))
    assert w.token_weights[0].tolist() != [1.0] * 4  # constant focus: the compensation alone weighs it
    assert w.token_weights[1].tolist() == [1.0] * 4  # one valid token
    assert w.token_weights[2].tolist() == [1.0] * 4  # nothing valid
    assert w.score[2] == 0
    # Without an image the raw score is 0, between the extremes -0.5 and 0.4.
    torch.testing.assert_close(w.normalized[3], w.normalized[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(w.trajectory_weights[3], w.trajectory_weights[0], rtol=0, atol=1e-6)
    assert w.trajectory_weights[1] == w.trajectory_weights[2]


def test_official_weighs_rows_with_a_focus_of_zero_as_the_published_code_does(device):
    focus, mask, groups = (x.to(device) for x in (torch.rand(4, 8), torch.ones(4, 8), torch.zeros(4).long()))
    focus[1] = 0.0
    w = vgpo_weights(focus, mask, groups, VGPOConfig.official())
    for sees in (torch.ones(4) > 0, torch.arange(4) != 1):
        told = vgpo_weights(focus, mask, groups, VGPOConfig.official(), has_visual=sees.to(device))
        for found, expected in zip(w, told, strict=True):
            assert torch.equal(found, expected)
    assert w.trajectory_weights[1] != 1


@pytest.mark.parametrize("fields", [{}, {"focus_scale": "affine"}, {"focus_scale": "affine", "grouping": "ids"}])
def test_official_runs_in_plain_torch_and_says_so(fields, device):
    inputs, config = [x.to(device) for x in batch()], VGPOConfig.official(**fields)
    for found, expected in zip(
        vgpo_weights(*inputs, config), vgpo_weights(*inputs, config, impl="reference"), strict=True
    ):
        assert torch.equal(found, expected)
    for impl in ("triton", "native"):
        with pytest.raises(
            RuntimeError, match=f"impl='{impl}' has no kernel for .*='.*'.*pass impl='reference' or None"
        ):
            vgpo_weights(*inputs, config, impl=impl)


class TestErrors:
    def call(self, **changed):
        focus, mask, group_ids = batch()
        arguments = {"focus": focus, "completion_mask": mask, "group_ids": group_ids, "config": VGPOConfig.paper()}
        return vgpo_weights(**{**arguments, **changed})

    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"focus": [[0.1]]}, TypeError, "focus: expected a tensor, got list"),
            ({"focus": torch.rand(8)}, ValueError, r"focus: expected shape \(B, T\), got \(8,\)"),
            ({"focus": torch.ones(8, 37, dtype=torch.int64)}, TypeError, "focus: expected dtype float16 .*int64"),
            ({"focus": torch.rand(0, 37)}, ValueError, "focus: expected at least one element"),
            ({"focus": torch.rand(8, 0)}, ValueError, "focus: expected at least one element"),
            ({"completion_mask": torch.ones(8, 36)}, ValueError, r"completion_mask: expected shape \(8, 37\)"),
            ({"group_ids": torch.zeros(8)}, TypeError, "group_ids: expected dtype int8 .*got float32"),
            ({"group_ids": torch.zeros(8, 1, dtype=torch.int64)}, ValueError, r"group_ids: expected shape \(8,\)"),
            ({"config": "paper"}, TypeError, "config: expected a VGPOConfig, got str"),
            ({"source": "cosine"}, ValueError, "source: expected one of 'similarity', 'attention', got 'cosine'"),
            ({"has_visual": torch.ones(8)}, TypeError, "has_visual: expected dtype bool, got float32"),
            ({"has_visual": torch.ones(7) > 0}, ValueError, r"has_visual: expected shape \(8,\), got \(7,\)"),
            ({"advantages": torch.ones(8, 37)}, ValueError, r"advantages: expected shape \(8,\), got \(8, 37\)"),
            ({"config": VGPOConfig(negative_strength=0.5)}, ValueError, "advantages: expected .*got None"),
            ({"config": VGPOConfig(warmup_steps=3)}, ValueError, "step: expected an int with warmup_steps=3, got None"),
            ({"step": -1}, ValueError, "step: expected at least 0, got -1"),
            ({"step": 1.5}, TypeError, "step: expected an int, got float"),
            ({"impl": "cuda"}, ValueError, "impl: expected one of 'triton', 'native', 'reference' or None, got 'cuda'"),
        ],
    )
    def test_every_argument_is_checked(self, changed, error, message):
        with pytest.raises(error, match=message):
            self.call(**changed)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_score_that_is_no_number_is_refused_with_its_place(self, value):
        focus, _, _ = batch()
        focus[3, 4] = value
        with pytest.raises(ValueError, match=f"focus: expected finite scores .*got {value} at row 3, column 4"):
            self.call(focus=focus)

    @pytest.mark.parametrize("value", [0.5, -1, 2, float("nan")])
    def test_a_mask_of_other_values_is_refused(self, value):
        _, mask, _ = batch()
        mask = mask.float()
        mask[3, 4] = value
        expected = f"completion_mask: expected 0 or 1, got {float(value)} at row 3, position 4"
        with pytest.raises(ValueError, match=expected):
            self.call(completion_mask=mask)

    def test_an_advantage_without_a_sign_is_refused_where_it_is_read(self):
        advantages = torch.arange(8.0)
        advantages[5] = float("nan")
        with pytest.raises(ValueError, match="advantages: expected no NaN, got nan at row 5"):
            self.call(advantages=advantages, config=VGPOConfig(negative_strength=0.5))
        assert self.call(advantages=advantages).token_weights.isfinite().all()

    @pytest.mark.parametrize("name", ["completion_mask", "advantages"])
    def test_the_kernels_check_mask_and_advantages_when_debugging(self, name, monkeypatch, device):
        focus, mask, group_ids = (x[:2, :9] if x.dim() == 2 else x[:2] for x in batch())
        inputs = {"focus": focus, "completion_mask": mask.float(), "group_ids": group_ids, "advantages": torch.ones(2)}
        inputs[name].view(-1)[0] = float("nan")
        inputs = {key: x.to(device) for key, x in inputs.items()}
        config = VGPOConfig(negative_strength=0.5)
        monkeypatch.delenv("VGPO_DEBUG", raising=False)
        assert vgpo_weights(**inputs, config=config, impl="triton").token_weights.isfinite().all()
        monkeypatch.setenv("VGPO_DEBUG", "1")
        with pytest.raises(ValueError, match=f"{name}: expected .*, got nan at row 0"):
            vgpo_weights(**inputs, config=config, impl="triton")

    def test_the_kernels_refuse_it_too_when_debugging(self, monkeypatch, device):
        monkeypatch.setenv("VGPO_DEBUG", "1")
        focus, mask, group_ids = (x.to(device) for x in batch())
        focus[0, 7] = float("nan")
        with pytest.raises(ValueError, match="got nan at row 0, column 7"):
            vgpo_weights(focus, mask, group_ids, VGPOConfig.paper(), impl="triton")
