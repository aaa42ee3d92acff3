"""Every error names the argument, what was expected and what came."""

import pytest
import torch
from focus_cases import inputs

from vgpo_kernels import _native
from vgpo_kernels.focus import visual_focus_score


def arguments(**changes):
    states, visual, completion, ids = inputs(2, 20, 8, kind="packed images")
    named = {"hidden_states": states, "visual_mask": visual, "completion_mask": completion, **ids}
    return {**named, **changes}


def changed(name, position, value):
    tensor = arguments()[name].clone()
    tensor[position] = value
    return {name: tensor}


VISUAL = tuple(arguments()["visual_mask"].nonzero()[3].tolist())
GENERATED = tuple(arguments()["completion_mask"].nonzero()[5].tolist())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": [1.0]}, TypeError, "hidden_states: expected a tensor, got list"),
        ({"hidden_states": torch.ones(2, 20)}, ValueError, r"hidden_states: .*\(B, L, D\), got \(2, 20\)"),
        ({"hidden_states": torch.ones(2, 20, 8, dtype=torch.int64)}, TypeError, "hidden_states: .*got int64"),
        ({"hidden_states": torch.ones(0, 20, 8)}, ValueError, r"hidden_states: .*got shape \(0, 20, 8\)"),
        ({"hidden_states": torch.ones(2, 20, 0)}, ValueError, r"hidden_states: .*got shape \(2, 20, 0\)"),
        ({"visual_mask": None}, TypeError, "visual_mask: expected a tensor, got NoneType"),
        ({"visual_mask": torch.ones(1, 20)}, ValueError, r"visual_mask: .*\(2, 20\), got \(1, 20\)"),
        ({"visual_mask": torch.ones(2, 20, dtype=torch.cfloat)}, TypeError, "visual_mask: .*got complex64"),
        ({"completion_mask": torch.ones(2, 19)}, ValueError, r"completion_mask: .*\(2, 20\), got \(2, 19\)"),
        ({"image_ids": torch.ones(2, 20)}, TypeError, "image_ids: expected dtype int8 or .*got float32"),
        ({"image_ids": torch.ones(20, dtype=torch.int64)}, ValueError, r"image_ids: .*\(2, 20\), got \(20,\)"),
        ({"seq_ids": torch.ones(2, 20, dtype=torch.bool)}, TypeError, "seq_ids: expected .*got bool"),
        ({"seq_ids": torch.ones(2, 21, dtype=torch.int64)}, ValueError, r"seq_ids: .*\(2, 20\), got \(2, 21\)"),
        (
            {"visual_mask": torch.ones(2, 20, device="meta")},
            ValueError,
            "visual_mask: expected a tensor on cpu, got one on meta",
        ),
        ({"impl": "cuda"}, ValueError, "impl: expected one of 'triton', 'native', 'reference' or None, got 'cuda'"),
    ],
)
def test_shapes_dtypes_and_devices(changes, error, message):
    with pytest.raises(error, match=message):
        visual_focus_score(**arguments(**changes))


VALUES = [
    (
        {"visual_mask": torch.full((2, 20), 0.5)},
        r"visual_mask: expected 0 or 1, got 0.5 at row 0, position 0",
    ),
    (
        {"completion_mask": torch.full((2, 20), 2)},
        r"completion_mask: expected 0 or 1, got 2 at row 0, position 0",
    ),
    (
        changed("completion_mask", VISUAL, True),
        "completion_mask: expected no visual token in the completion, "
        f"got True at row {VISUAL[0]}, position {VISUAL[1]}",
    ),
    (
        changed("image_ids", VISUAL, -1),
        f"image_ids: expected 0 or more at every visual token, got -1 at row {VISUAL[0]}, position {VISUAL[1]}",
    ),
    (
        changed("seq_ids", GENERATED, -1),
        "seq_ids: expected 0 or more at visual and completion tokens, "
        f"got -1 at row {GENERATED[0]}, position {GENERATED[1]}",
    ),
]


@pytest.mark.parametrize(("changes", "message"), VALUES)
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_values_on_cpus(impl, changes, message):
    if impl == "native" and _native.missing():
        pytest.skip(_native.missing())
    with pytest.raises(ValueError, match=message):
        visual_focus_score(**arguments(**changes), impl=impl)


@pytest.mark.parametrize(("changes", "message"), VALUES)
def test_values_in_the_kernels_when_debugging(device, monkeypatch, changes, message):
    moved = {name: value.to(device) for name, value in arguments(**changes).items()}
    monkeypatch.delenv("VGPO_DEBUG", raising=False)
    assert visual_focus_score(**moved, impl="triton").isfinite().all()
    monkeypatch.setenv("VGPO_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        visual_focus_score(**moved, impl="triton")


def test_float64_is_for_the_reference(device):
    doubles = {name: value.to(device) for name, value in arguments().items()}
    doubles["hidden_states"] = doubles["hidden_states"].double()
    with pytest.raises(RuntimeError, match="float64: pass impl='reference'"):
        visual_focus_score(**doubles, impl="triton")
