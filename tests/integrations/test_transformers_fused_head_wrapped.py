"""The replaced head in models wrapped for several devices (DDP, FSDP; on a group of one) or trains a copy."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from head_cases import CONFIG, SMALL, TEMPERATURE, Case, assert_all_equal, forbidden_head
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from vgpo_kernels.integrations.transformers import model_logprobs
from vgpo_kernels.testing import assert_error_budget


@pytest.fixture(scope="module")
def lone_group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("lone_group")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_ddp(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SMALL)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    wrapped = DistributedDataParallel(case.model, **options)
    with forbidden_head(case.model, monkeypatch):
        for _ in range(2):  # a second step fails where the first one has left a parameter waiting
            found = case.fused(CONFIG, wrapped)
    found = {name.replace("of module.", "of "): value for name, value in found.items()}
    assert_all_equal(found, dense, exact)


@pytest.mark.usefixtures("lone_group")
# A tied head is in the root's group; another one may have its own, which is resharded after the forward.
@pytest.mark.parametrize(("name", "apart"), [(SMALL, False), ("qwen2_vl", False), ("qwen2_vl", True)])
def test_fsdp(name: str, apart: bool) -> None:
    case = Case(name)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    mesh = init_device_mesh("cpu", (1,))
    decoder = case.model.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    if apart:
        fully_shard(case.model.lm_head, mesh=mesh)
    fully_shard(case.model, mesh=mesh)
    with torch.no_grad():
        scored = model_logprobs(case.model, case.batch, prompt_length=case.prompt, temperature=TEMPERATURE)
    for _ in range(2):
        found = case.fused(CONFIG)
    assert_error_budget("scored", scored.logps, dense["logps"], exact["logps"])
    found = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}
    assert_all_equal(found, dense, exact)


class Copied(nn.Module):
    """What PEFT puts in the place of a module in `modules_to_save`."""

    def __init__(self, original: nn.Module, copied: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict({"default": copied})
        self.active_adapters = ["default"]
        self.disable_adapters = False

    def forward(self, states: Tensor) -> Tensor:
        return (self.original_module if self.disable_adapters else self.modules_to_save["default"])(states)


def test_a_head_of_which_a_copy_is_trained_is_that_copy() -> None:
    case = Case("internvl")
    original = case.model.lm_head
    copied = nn.Linear(original.in_features, original.out_features, bias=False)
    case.model.lm_head = wrapped = Copied(original, copied)
    given = {"prompt_length": case.prompt, "completion_mask": case.mask}
    for disabled in (False, True):
        wrapped.disable_adapters = disabled
        case.model.zero_grad()
        found = model_logprobs(case.model, case.batch, **given).logps
        logits = case.model(**case.batch).logits[:, case.prompt - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, case.targets[..., None])[..., 0].masked_fill(~case.mask, 0.0)
        assert_close(found, expected)
        found.sum().backward()
        assert (copied.weight.grad is None) == disabled
