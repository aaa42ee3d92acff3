"""The training loops of README and docs, run as they stand on a tiny model and rows with and without a picture."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from torch import Tensor

import vgpo_kernels.integrations.transformers as vgpo
from vgpo_kernels import VGPOConfig, vgpo_weights

ROOT = Path(__file__).parents[2]
FAMILY = "gemma3"  # a fixed number of tokens a picture, and pixels that can be cut by picture
PAGES = {
    "tensors": ("README.md", "predicting = states[:, P - 1 : -1]"),
    "attention": ("README.md", "with vgpo.record_visual_attention(model, layers="),
    "hidden states": ("docs/policy_loss.md", "new_states[:, P - 1 : -1]"),
    "own loop": ("docs/training.md", "with fused_logprobs(model) as fused:"),
    "recording": ("docs/attention.md", "from_pretrained(folder"),
}


def block(name: str) -> str:
    """The one block of code with a given line on a page."""
    page, line = PAGES[name]
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (code,) = [code for code in found if line in code]
    return code


def run(name: str, given: dict[str, Any]) -> dict[str, Any]:
    names = dict(given)
    exec(compile(block(name), PAGES[name][0], "exec"), names)
    return names


@pytest.fixture
def given() -> dict[str, Any]:
    """What the loops take from their surroundings: two groups of three rows, one row of each without a picture."""
    model = tiny_vlms.make(FAMILY).eval()
    prompts = tiny_vlms.make_batch(FAMILY)
    prompts = {key: torch.cat([value, value]) for key, value in prompts.items()}
    torch.manual_seed(2)
    completion, mask = torch.randint(1, 90, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    mask[1, 2:] = mask[3, 4:] = 0
    batch = tiny_vlms.continued(FAMILY, prompts, completion, mask)
    P = prompts["input_ids"].shape[1]
    whole = torch.nn.functional.pad(mask, (P, 0))
    shared = {"P": P, "prompt_length": P, "model": model, "group_ids": torch.arange(6) // 3, "whole": whole}
    shared |= {"visual_mask": batch["input_ids"] == tiny_vlms.IMAGE, "advantages": torch.randn(6)}
    return shared | {"batch": batch, "inputs": batch, "input_ids": batch["input_ids"], "mask": mask}


def rows_of(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The arguments of some rows; pictures lie in the order 2, 0, 1 a row."""
    pictures = torch.tensor([0, 0, 2, 3, 3, 5])
    wanted = [row for row in rows.tolist() if row % 3 != 1]
    of = [int(pictures[row]) + extra for row in wanted for extra in range(2 if row % 3 == 0 else 1)]
    return {key: value[of] if key == "pixel_values" else value[rows] for key, value in batch.items()}


def assert_weighted(weights: Any) -> None:
    """Rows without a picture are not weighted, however long; the others are."""
    assert weights.trajectory_weights[[1, 4]].tolist() == [1.0, 1.0]
    assert (weights.token_weights[[1, 4]] == 1).all()
    assert (weights.trajectory_weights[[0, 2, 3, 5]] != 1).all()
    assert weights.token_weights[0].std() > 0.01


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    assert len(found) > 10
    model.zero_grad()
    return found


def test_the_loop_of_hidden_states(given):
    model, batch = given["model"], given["batch"]
    with torch.no_grad():
        states = model.model(**batch).last_hidden_state
    rows = torch.tensor([0, 1, 2])
    new_states = model.model(**rows_of(batch, rows)).last_hidden_state
    names = run(
        "hidden states",
        given | {"states": states, "new_states": new_states, "rows": rows, "completion_mask": given["whole"]},
    )
    assert_weighted(names["weights"])
    logps = torch.log_softmax(model(**batch).logits[:, given["P"] - 1 : -1].double(), -1)
    expected = logps.gather(-1, names["completion_ids"][..., None])[..., 0]
    valid = given["mask"] != 0
    torch.testing.assert_close(names["old_logps"].double()[valid], expected[valid], rtol=1e-4, atol=1e-4)
    assert names["out"].metrics["ratio_max"].item() == pytest.approx(1.0, abs=1e-4)
    assert gradients(model)


def test_the_functions_of_tensors(given):
    model, batch = given["model"], given["batch"]
    states = model.model(**batch).last_hidden_state
    completion_ids = batch["input_ids"][:, given["P"] :]
    logps = torch.log_softmax(model(**batch).logits[:, given["P"] - 1 : -1].detach(), -1)
    old_logps = logps.gather(-1, completion_ids[..., None])[..., 0]
    loose = {"states": states, "completion_ids": completion_ids, "old_logps": old_logps}
    names = run("tensors", given | loose | {"completion_mask": given["whole"]})
    assert_weighted(names["weights"])
    assert names["out"].metrics["ratio_max"].item() == pytest.approx(1.0, abs=1e-4)
    assert gradients(model)


def test_the_recording_of_a_transformers_model(given):
    model = given["model"]
    model.set_attn_implementation("eager")
    focus = run("attention", given)["focus"]
    assert (focus[[1, 4]] == 0).all()
    assert (focus[[0, 2, 3, 5]][given["mask"][[0, 2, 3, 5]] != 0] > 0).all()


def test_the_loop_of_ones_own_gives_the_gradient_of_the_whole_batch(given):
    model, batch = given["model"], given["batch"]
    found = []
    for parts in ([torch.arange(6)], [torch.tensor([0, 1]), torch.tensor([2, 3, 4]), torch.tensor([5])]):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        names = run(
            "own loop",
            given
            | {
                "completion_mask": given["mask"],
                "rewards": torch.tensor([1.0, 0.0, 0.5, 0.2, 0.9, 0.1]),
                "micro_batches": [(rows, rows_of(batch, rows)) for rows in parts],
                "optimizer": optimizer,
            },
        )
        assert_weighted(names["weights"])
        advantages = names["advantages"].view(2, 3)
        torch.testing.assert_close(advantages.mean(1), torch.zeros(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(2), rtol=1e-4, atol=0)
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


def test_the_recording_of_attention(given, tmp_path):
    names = given | {"folder": tmp_path, "completion_mask": given["mask"], "prompt_batch": given["batch"]}
    given["model"].save_pretrained(tmp_path)
    names.pop("model")
    code = block("recording").split("# While sampling.")[0]
    exec(compile(code, PAGES["recording"][0], "exec"), names)
    assert_weighted(names["weights"])
    with torch.no_grad(), vgpo.record_visual_attention(names["model"], "all", prompt_length=given["P"]) as rec:
        names["model"](**given["batch"])
    focus = vgpo.focus_from_attention(rec, given["mask"])
    assert (focus[[1, 4]] == 0).all()
    weights = vgpo_weights(focus, given["mask"], given["group_ids"], VGPOConfig.balanced(), source="attention")
    torch.testing.assert_close(weights.trajectory_weights, names["weights"].trajectory_weights)
