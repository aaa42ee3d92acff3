"""What all implementations promise: corners, padding, invariances, torch.compile."""

import pytest
import torch
from focus_cases import KINDS, inputs
from torch._dynamo.testing import CompileCounterWithBackend

from vgpo_kernels import _native
from vgpo_kernels.focus import visual_focus_score

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() or bool(_native.missing()), reason="CPU kernels take CPU tensors"
    ),
)
IMPLEMENTATIONS = ["reference", "triton", NATIVE]


@pytest.fixture(params=IMPLEMENTATIONS)
def score(request, device):
    """The function with an implementation chosen, its inputs moved to the device."""

    def call(states, visual, completion, **ids):
        moved = {name: value.to(device) for name, value in ids.items()}
        return visual_focus_score(
            states.to(device), visual.to(device), completion.to(device), impl=request.param, **moved
        ).cpu()

    return call


def test_mean_similarity_of_the_published_code(score, conformance_vectors):
    prompt = conformance_vectors.meta["prompt_length"]
    tokens = conformance_vectors["input_ids"]
    visual = tokens == conformance_vectors.meta["image_token_id"]
    completion = torch.zeros_like(visual)
    completion[:, prompt:] = conformance_vectors["response_mask"].bool()
    scores = score(conformance_vectors["hidden_states"], visual, completion)[:, prompt:]
    mean = scores[visual.any(1)].double().mean()
    assert abs(mean - conformance_vectors["mean_similarity"]) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_neither_visual_nor_generated_are_not_read(score, kind):
    states, visual, completion, ids = inputs(3, 60, 40, kind=kind)
    expected = score(states, visual, completion, **ids)
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])
    states[~(visual | completion)] = garbage.repeat(10)
    assert torch.equal(score(states, visual, completion, **ids), expected)
    assert torch.equal(expected != 0, completion & (expected != 0))
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_without_an_image_score_zero_unread(score, kind):
    states, visual, completion, ids = inputs(3, 60, 16, kind=kind)
    blind = torch.zeros_like(visual)
    blind[2, : 30 if kind.startswith("packed") else 60] = True
    assert not (visual & blind).any()
    states[blind] = float("nan")
    scores = score(states, visual, completion, **ids)
    assert torch.equal(scores[blind], torch.zeros(int(blind.sum())))
    assert scores[completion & ~blind].ne(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_anywhere(score, kind):
    states, visual, completion, ids = inputs(2, 40, 16, kind=kind)
    assert torch.equal(score(states, visual & False, completion, **ids), torch.zeros(2, 40))


def test_no_completion(score):
    states, visual, completion, _ = inputs(2, 40, 16)
    assert torch.equal(score(states, visual, completion & False), torch.zeros(2, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parallel_states_score_exactly_within_one(score, dtype):
    direction = torch.linspace(-3, 3, 37)
    states = (direction * torch.tensor([1, 2, -1, 0.5, 7])[:, None])[None].to(dtype)
    visual = torch.tensor([[True, True, False, False, False]])
    scores = score(states, visual, ~visual)[0, 2:]
    assert scores.abs().max() <= 1
    torch.testing.assert_close(scores, torch.tensor([-1.0, 1, 1]), atol=2e-7, rtol=0)


def test_zero_states_and_zero_prototypes_score_zero(score):
    states = torch.randn(2, 4, 8)
    states[0, 3] = 0
    states[1, 0] = -states[1, 1]
    visual = torch.tensor([[True, True, False, False]] * 2)
    scores = score(states, visual, ~visual)
    assert scores[0, 2] != 0
    assert scores[0, 3] == 0
    assert torch.equal(scores[1], torch.zeros(4))


def test_nan_is_not_hidden(score):
    states, visual, completion, _ = inputs(3, 40, 16)
    states[0, int(completion[0].nonzero()[2])] = float("nan")
    states[1, int(visual[1].nonzero()[0])] = float("nan")
    scores = score(states, visual, completion)
    assert scores[0].isnan().sum() == 1
    assert torch.equal(scores[1].isnan(), completion[1])
    assert not scores[2].isnan().any()


def test_the_largest_cosine_over_the_images(score):
    states = torch.eye(3)[[0, 1, 2, 1]][None]
    states[0, 3] = torch.tensor([0.6, 0.8, 0.0])
    visual = torch.tensor([[True, True, True, False]])
    images = torch.tensor([[8, 8, 3, -1]])
    negative = -states.clone()
    negative[0, :3] = states[0, :3]
    # Against the first image (1, 1, 0) / 2 and the second (0, 0, 1).
    assert score(states, visual, ~visual, image_ids=images)[0, 3] == pytest.approx(1.4 / 2**0.5, abs=1e-6)
    assert score(negative, visual, ~visual, image_ids=images)[0, 3] == 0


def test_packed_rows_score_as_separate_rows(score):
    states, visual, completion, ids = inputs(3, 77, 24, kind="images")
    apart = score(states, visual, completion, **ids)
    packed = [value.reshape(1, -1, *value.shape[2:]) for value in (states, visual, completion)]
    sequences = torch.tensor([5, 0, 9]).repeat_interleave(77)[None]
    together = score(*packed, image_ids=ids["image_ids"].reshape(1, -1), seq_ids=sequences)
    torch.testing.assert_close(together, apart.reshape(1, -1), atol=2e-7, rtol=0)


def test_ids_are_only_names(score):
    states, visual, completion, ids = inputs(3, 80, 24, kind="packed images")
    renamed = {
        name: torch.where(value < 0, value, 2**40 - 3 * value) for name, value in ids.items()
    }  # other numbers, in the opposite order
    scores = score(states, visual, completion, **ids)
    torch.testing.assert_close(score(states, visual, completion, **renamed), scores, atol=2e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_numbers(score, dtype):
    states, visual, completion, _ = inputs(2, 50, 16)
    expected = score(states, visual, completion)
    assert torch.equal(score(states, visual.to(dtype), completion.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_ids_of_any_integer_type(score, dtype):
    states, visual, completion, ids = inputs(2, 50, 16, kind="packed images")
    small = {name: torch.where(value < 0, value, value % 60) for name, value in ids.items()}
    expected = score(states, visual, completion, **small)
    narrow = {name: value.to(dtype) for name, value in small.items()}
    assert torch.equal(score(states, visual, completion, **narrow), expected)


def test_no_gradient_flows(score):
    states, visual, completion, _ = inputs(2, 30, 8)
    assert not score(states.requires_grad_(), visual, completion).requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["plain", "packed images"])
def test_operator(device, impl, kind):
    states, visual, completion, ids = inputs(2, 30, 8, kind=kind)
    ids = [ids[name].to(device) if name in ids else None for name in ("image_ids", "seq_ids")]
    arguments = (states.to(device), visual.to(device), completion.to(device), *ids, impl)
    torch.library.opcheck(torch.ops.vgpo.visual_focus_score.default, arguments)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_whole_and_once_for_all_lengths(device, impl):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def doubled(states, visual, completion, image_ids):
        return 2 * visual_focus_score(states, visual, completion, image_ids=image_ids, impl=impl)

    for length in (30, 47):
        states, visual, completion, ids = inputs(2, length, 8, kind="images")
        arguments = [value.to(device) for value in (states, visual, completion, ids["image_ids"])]
        expected = 2 * visual_focus_score(*arguments[:3], image_ids=arguments[3], impl=impl)
        assert torch.equal(doubled(*arguments), expected)
    assert counter.frame_count == 1
