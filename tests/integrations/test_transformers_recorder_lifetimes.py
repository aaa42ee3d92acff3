"""Recorders and the model's own `generate`: left in any order, replaced by others, copied with the model."""

import copy
from typing import Any

import pytest
import tiny_vlms
import torch

from vgpo_kernels.integrations.transformers import record_visual_attention

FAMILY = "qwen2_5_vl"


@pytest.fixture
def model() -> Any:
    model = tiny_vlms.make(FAMILY)
    model.set_attn_implementation({"text_config": "vgpo"})
    return model


@pytest.fixture
def batch() -> dict[str, Any]:
    return tiny_vlms.make_batch(FAMILY)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_recorders_left_in_any_order(model: Any, batch: dict[str, Any], order: tuple[int, ...]) -> None:
    options = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": tiny_vlms.NOT_WORDS}
    contexts = [record_visual_attention(model, queries="predicting") for _ in order]
    recorders = [context.__enter__() for context in contexts]
    for index in order:
        model.generate(**batch, **options)
        assert recorders[index].mass.shape == (1, 3, 2, 1)
        assert "generate" in model.__dict__
        contexts[index].__exit__(None, None, None)
    assert "generate" not in model.__dict__
    compiled: list[Any] = []
    torch.compile(lambda x: x + index, backend=lambda graph, _: compiled.append(graph) or graph)(torch.ones(1))
    assert compiled, "what a recorder keeps from running compiled runs so again"


def test_generate_that_was_replaced_before_or_meanwhile(model: Any, batch: dict[str, Any]) -> None:
    calls, plain = [], model.generate

    def before(*args: Any, **kwargs: Any) -> Any:
        calls.append("before")
        return plain(*args, **kwargs)

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        calls.append("meanwhile")
        return followed(*args, **kwargs)

    model.generate = before
    with record_visual_attention(model, queries="predicting") as rec:
        model.generate(**batch, max_new_tokens=2)
    assert model.generate is before
    assert rec.mass.shape[2] == 2
    with record_visual_attention(model):
        followed, model.generate = model.generate, meanwhile
    assert model.generate is meanwhile
    model.generate(**batch, max_new_tokens=1)
    assert calls == ["before", "meanwhile", "before"]
    del model.generate


def test_copy_of_a_model_made_while_recorded(model: Any, batch: dict[str, Any]) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": tiny_vlms.NOT_WORDS}
    other = tiny_vlms.make(FAMILY, seed=3)
    expected, theirs = model.generate(**batch, **options), other.generate(**batch, **options)
    assert not torch.equal(expected, theirs)
    with record_visual_attention(model, queries="predicting") as rec:
        twin = copy.deepcopy(model)
        twin.load_state_dict(other.state_dict())
        assert torch.equal(twin.generate(**batch, **options), theirs)
        with pytest.raises(RuntimeError, match="nothing has been recorded"):
            _ = rec.mass
        assert torch.equal(model.generate(**batch, **options), expected)
    mass = rec.mass
    assert torch.equal(twin.generate(**batch, **options), theirs)
    assert torch.equal(rec.mass, mass)
    with record_visual_attention(twin, queries="predicting") as rec:
        twin.generate(**batch, **options)
    assert rec.mass.shape == (1, 3, 3, 1)
