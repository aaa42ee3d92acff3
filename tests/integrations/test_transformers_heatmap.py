"""What each visual token received, laid out on its picture."""

from typing import Any

import pytest
import tiny_vlms
import torch
from torch.testing import assert_close

from vgpo_kernels.integrations.transformers import Recorder, record_visual_attention


def record(name: str, batch: dict[str, Any], **options: Any) -> Recorder:
    model = tiny_vlms.make(name)
    model.set_attn_implementation("vgpo")
    with torch.no_grad(), record_visual_attention(model, "all", columns=True, **options) as rec:
        model(**batch)
    return rec


def test_grids_that_the_model_is_given() -> None:
    """Pictures of 1 x 2 and 3 x 1 tokens in row 0, none in row 1, 2 x 2 in row 2."""
    word, image = 5, tiny_vlms.IMAGE
    ids = torch.tensor(
        [[word, image, image, word, image, image, image, word], [word] * 8, [word, *[image] * 4, *[word] * 3]]
    )
    grid = torch.tensor([[1, 2, 4], [1, 6, 2], [1, 4, 4]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4)
    batch = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    batch["mm_token_type_ids"] = (ids == image).int()
    rec = record("qwen2_vl", batch)
    assert rec.visual_positions.tolist() == [[1, 2, 4, 5, 6], [-1] * 5, [1, 2, 3, 4, -1]]
    assert_close(rec.heatmap(0, 0), rec.columns[:, 0, :2].mean(0).view(1, 2))
    assert_close(rec.heatmap(0, 1), rec.columns[:, 0, 2:].mean(0).view(3, 1))
    assert_close(rec.heatmap(2), rec.columns[:, 2, :4].mean(0).view(2, 2))
    assert_close(rec.heatmap(2, layer=1), rec.columns[1, 2, :4].view(2, 2))
    assert_close(rec.heatmap(2, grid=(1, 4)), rec.columns[:, 2, :4].mean(0).view(1, 4))
    with pytest.raises(IndexError, match="image: expected one of the sample's 0 images, got 0"):
        rec.heatmap(1)
    with pytest.raises(IndexError, match="image: expected one of the sample's 2 images, got 2"):
        rec.heatmap(0, 2)
    with pytest.raises(IndexError, match="sample: expected one of 3 rows, got 3"):
        rec.heatmap(3)
    with pytest.raises(ValueError, match=r"layer: expected one of the recorded \[0, 1, 2\], got 5"):
        rec.heatmap(0, layer=5)
    with pytest.raises(ValueError, match=r"grid: expected height x width of 4 tokens, got \(3, 3\)"):
        rec.heatmap(2, grid=(3, 3))


def test_square_pictures_and_the_mean_of_heads() -> None:
    rec = record("gemma3", tiny_vlms.make_batch("gemma3"), heads="all")
    assert rec.columns.shape == (3, 3, 4, 8)
    assert_close(rec.heatmap(0, 1), rec.columns[:, 0, :, 4:].mean(dim=(0, 1)).view(2, 2))
    assert_close(rec.heatmap(2, 0, layer=0), rec.columns[0, 2, :, :4].mean(0).view(2, 2))


def test_generate_lays_out_the_prompts_pictures() -> None:
    model = tiny_vlms.make("qwen2_5_vl")
    model.set_attn_implementation("vgpo")
    batch = tiny_vlms.make_batch("qwen2_5_vl")
    with record_visual_attention(model, columns=True) as rec:
        model.generate(**batch, max_new_tokens=3, do_sample=False, suppress_tokens=tiny_vlms.NOT_WORDS)
    assert_close(rec.heatmap(0, 1), rec.columns[0, 0, 4:].view(2, 2))


@pytest.mark.parametrize("samples", [1, 2])
def test_generate_lays_out_pictures_that_are_no_square(samples: int) -> None:
    """2 x 8 tokens, as many as 4 x 4; 3 x 1 and 1 x 2 in another row. transformers may encode them beforehand."""
    word, image = 5, tiny_vlms.IMAGE
    ids = torch.tensor([[word, *[image] * 16, word], [*[word] * 9, *[image] * 3, word, *[image] * 2, *[word] * 3]])
    grid = torch.tensor([[1, 4, 16], [1, 6, 2], [1, 2, 4]])
    model = tiny_vlms.make("qwen2_5_vl")
    model.set_attn_implementation("vgpo")
    vision = model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid}
    batch |= {"pixel_values": torch.randn(int(grid.prod(1).sum()), width), "mm_token_type_ids": (ids == image).int()}
    sampling = {"do_sample": True, "num_return_sequences": samples} if samples > 1 else {"do_sample": False}
    with record_visual_attention(model, columns=True) as rec:
        model.generate(**batch, max_new_tokens=3, suppress_tokens=tiny_vlms.NOT_WORDS, **sampling)
    for sample in range(samples):
        assert_close(rec.heatmap(sample, 0), rec.columns[0, sample].view(2, 8))
        other = samples + sample
        assert_close(rec.heatmap(other, 0), rec.columns[0, other, :3].view(3, 1))
        assert_close(rec.heatmap(other, 1), rec.columns[0, other, 3:5].view(1, 2))


def test_videos_are_visual_but_no_pictures() -> None:
    """Without pixels their embeddings stand for them."""
    ids = torch.tensor([[5, *[tiny_vlms.VIDEO] * 3, 6, *[tiny_vlms.IMAGE] * 4, 7]])
    rec = record("llava_onevision", {"input_ids": ids})
    assert rec.visual_positions.tolist() == [[1, 2, 3, 5, 6, 7, 8]]
    assert_close(rec.heatmap(0, grid=(2, 2)), rec.columns[:, 0, 3:].mean(0).view(2, 2))
    assert bool((rec.mass[:, 0, 1:4] > 0).all())
