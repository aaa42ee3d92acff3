"""The tiles of every target give what the reference gives: a machine runs its own only, the interpreter any."""

import importlib

import pytest
import torch
from dense_attention import inputs, intervals

import vgpo_kernels as vgpo

USERS = ("backward", "column", "decode", "forward", "mass")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs its own tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942"])
def test_other_targets_tiles(target: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in USERS:
        monkeypatch.setattr(
            importlib.import_module(f"vgpo_kernels.attention.triton.{module}"), "target_of", lambda _: target
        )
    # More keys than a tile of any target, no multiple of one, and intervals in no order.
    q, k, v = inputs(1, (4, 2), (66, 150), 64, dtype)
    masks = {"intervals": intervals("arbitrary", 1, 66, 150), "key_mask": torch.arange(150)[None] != 77}
    visual = torch.arange(150)[None] % 40 < 25

    def everything(impl: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        riding = vgpo.visual_attention(*leaves, visual, **masks, impl=impl)
        riding.out.float().sum().add(riding.visual_mass.sum()).backward()
        lse = riding.lse.detach()
        mass = vgpo.attention_mass(q, k, lse, visual.int(), 2, **masks, impl=impl)
        received = vgpo.attention_column_sum(q, k, lse, visual, **masks, impl=impl)
        last = {"intervals": tuple(x[:, -1:] for x in masks["intervals"]), "key_mask": masks["key_mask"]}
        few = vgpo.visual_attention(q[:, :, -1:], k, v, visual, **last, impl=impl)
        return [*riding, mass, received, *few, *(x.grad for x in leaves)]

    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for found, expected in zip(everything("triton"), everything("reference"), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
