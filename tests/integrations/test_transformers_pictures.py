"""Which visual token belongs to which picture: families whose pictures touch, are broken into rows, or marked."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma4Config,
    HunYuanVLConfig,
    Idefics3Config,
    InternVLConfig,
    Kimi_K25Config,
    Lfm2VlConfig,
    LlavaConfig,
    LlavaNextConfig,
    Mistral3Config,
    PaliGemmaConfig,
    Phi4MultimodalConfig,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
    VideoLlama3Config,
)

from vgpo_kernels.integrations.transformers import check_separable, image_ids, visual_token_mask
from vgpo_kernels.integrations.transformers.heatmap import find_picture, lay_out

IMAGE, VIDEO, BEGIN, END, BREAK = 8, 9, 6, 7, 5
TOWER = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
LLAVA = LlavaConfig(image_token_id=IMAGE, image_seq_length=16, vision_config=TOWER)
UNLIKE_ITS_TOWER = LlavaConfig(image_token_id=IMAGE, image_seq_length=576, vision_config=TOWER)
PIXTRAL = LlavaConfig(image_token_id=IMAGE, vision_config={"model_type": "pixtral", "patch_size": 4})
MISTRAL3 = Mistral3Config(image_token_id=IMAGE, vision_config={"model_type": "pixtral", "patch_size": 2})
LLAVA_NEXT = LlavaNextConfig(image_token_id=IMAGE)
GEMMA3 = Gemma3Config(image_token_id=IMAGE, boi_token_index=BEGIN, eoi_token_index=END, mm_tokens_per_image=4)
GEMMA4 = Gemma4Config(image_token_id=IMAGE, video_token_id=VIDEO, boi_token_id=BEGIN, eoi_token_id=END)
INTERNVL = InternVLConfig(
    image_token_id=IMAGE, image_seq_length=4, vision_config={"image_size": [8, 8], "patch_size": 2}
)
QWEN = Qwen2_5_VLConfig(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=BEGIN, vision_end_token_id=END
)
KIMI = Kimi_K25Config(image_token_id=IMAGE, video_token_id=VIDEO)
VIDEO_LLAMA = VideoLlama3Config(image_token_id=IMAGE, video_token_id=VIDEO)
HUNYUAN = HunYuanVLConfig(image_token_id=IMAGE)
UNKNOWN = (
    Idefics3Config(image_token_id=IMAGE),
    SmolVLMConfig(image_token_id=IMAGE),
    Lfm2VlConfig(image_token_id=IMAGE),
)


def inputs_of(*rows: list[int], **described: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor(rows), **{name: torch.tensor(value) for name, value in described.items()}}


TOUCHING = inputs_of([*[IMAGE] * 4, 1])
BROKEN = [IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END]


@pytest.mark.parametrize(
    ("config", "inputs", "counts", "expected"),
    [
        pytest.param(LLAVA, TOUCHING, [2], [[0, 0, 1, 1, -1]], id="touching, so many"),
        pytest.param(LLAVA, inputs_of([IMAGE] * 32), None, [[*[0] * 16, *[1] * 16]], id="touching, of a fixed number"),
        pytest.param(PIXTRAL, inputs_of(BROKEN, image_sizes=[[8, 8]]), None, [[0, 0, -1, 0, 0, -1]], id="broken"),
        pytest.param(
            MISTRAL3,
            inputs_of([*BROKEN, IMAGE, END], [1] * 5 + BROKEN[3:], image_sizes=[[8, 8], [4, 4], [4, 8]]),
            [2, 1],
            [[0, 0, -1, 0, 0, -1, 1, -1], [*[-1] * 5, 0, 0, -1]],
            id="broken, several",
        ),
        pytest.param(Idefics3Config(image_token_id=IMAGE), inputs_of(BROKEN), [1], [[0, 0, -1, 0, 0, -1]], id="one"),
        pytest.param(
            GEMMA4, inputs_of([BEGIN, IMAGE, END, BEGIN, IMAGE, IMAGE, END]), [2], [[-1, 0, -1, -1, 1, 1, -1]]
        ),
        pytest.param(INTERNVL, inputs_of([IMAGE, IMAGE, 1, IMAGE, 2]), [2], [[0, 0, -1, 1, -1]], id="tiles"),
        pytest.param(QWEN, inputs_of([IMAGE] * 3, image_grid_thw=[[1, 2, 4], [1, 2, 2]]), [2], [[0, 0, 1]], id="grids"),
        pytest.param(
            KIMI, inputs_of([IMAGE] * 3, image_grid_thw=[[1, 4, 2], [1, 2, 2]]), [2], [[0, 0, 1]], id="merged"
        ),
        pytest.param(VIDEO_LLAMA, inputs_of([IMAGE] * 3, image_grid_thw=[[1, 1, 2], [1, 1, 1]]), [2], [[0, 0, 1]]),
        pytest.param(
            HUNYUAN, inputs_of([IMAGE] * 9, image_grid_thw=[[1, 2, 4], [1, 2, 2]]), [2], [[0] * 5 + [1] * 4], id="ends"
        ),
        pytest.param(QWEN, inputs_of([1, 2], [IMAGE, 3], image_grid_thw=[[1, 2, 2]]), [0, 1], [[-1, -1], [0, -1]]),
    ],
)
def test_each_token_belongs_to_its_picture(
    config: Any, inputs: dict[str, Tensor], counts: list[int] | None, expected: list[list[int]]
) -> None:
    assert image_ids(config, inputs, counts).tolist() == expected
    if counts != [1]:  # one picture needs no knowledge
        check_separable(config, inputs)


@pytest.mark.parametrize("config", UNKNOWN, ids=lambda config: config.model_type)
def test_pictures_of_unknown_layout_are_refused(config: Any) -> None:
    message = f"where a picture of {type(config).__name__} ends is said neither by the model's inputs"
    with pytest.raises(ValueError, match=message):
        check_separable(config, TOUCHING)
    with pytest.raises(ValueError, match=message):
        image_ids(config, inputs_of([IMAGE, 1, IMAGE]), [2])


@pytest.mark.parametrize(
    ("config", "inputs", "counts", "message"),
    [
        (
            LLAVA_NEXT,
            TOUCHING,
            [2],
            "tokens of 2 pictures in row 0, .* llava_next takes for 1",
        ),
        (QWEN, inputs_of([IMAGE] * 3, image_grid_thw=[[1, 2, 2]]), None, "come to the 3 image tokens, got"),
        (
            MISTRAL3,
            inputs_of([IMAGE] * 3, image_sizes=[[4, 8]]),
            None,
            "expected grids of 3 tokens in row 0",
        ),
        (GEMMA4, TOUCHING, None, "expected the marks of gemma4, 6 and 7, around each picture"),
        (UNLIKE_ITS_TOWER, TOUCHING, None, "it names no number that fits its vision tower"),
        (GEMMA4, inputs_of([BEGIN, VIDEO, END]), None, "expected pictures alone, got tokens of videos"),
    ],
)
def test_what_does_not_fit_is_said(config: Any, inputs: dict[str, Tensor], counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_ids(config, inputs, counts)


def heatmap(config: Any, inputs: dict[str, Tensor], image: int, grid: tuple[int, int] | None) -> list[list[float]]:
    """Numbers the row's image tokens from 0, in the places of its picture."""
    return lay_out(torch.arange(40.0), find_picture(config, inputs, 0, image, grid)).tolist()


@pytest.mark.parametrize(
    ("config", "inputs", "image", "grid", "expected"),
    [
        pytest.param(PIXTRAL, inputs_of(BROKEN, image_sizes=[[8, 8]]), 0, None, [[0, 1], [2, 3]], id="rows"),
        pytest.param(UNLIKE_ITS_TOWER, inputs_of(BROKEN), 0, (2, 2), [[0, 1], [2, 3]], id="rows, as asked"),
        pytest.param(UNLIKE_ITS_TOWER, inputs_of(BROKEN * 2), 1, (2, 2), [[4, 5], [6, 7]], id="rows of two, as asked"),
        pytest.param(INTERNVL, inputs_of([*[IMAGE] * 4, 1, *[IMAGE] * 4]), 1, None, [[4, 5], [6, 7]], id="one tile"),
        pytest.param(INTERNVL, inputs_of([IMAGE] * 8), 0, (2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]], id="two tiles"),
        pytest.param(GEMMA3, inputs_of([IMAGE] * 8), 1, None, [[4, 5], [6, 7]], id="square, touching"),
        pytest.param(GEMMA4, inputs_of([BEGIN, *[IMAGE] * 2, END]), 0, (1, 2), [[0, 1]], id="marked"),
        pytest.param(KIMI, inputs_of([IMAGE] * 3, image_grid_thw=[[1, 4, 2], [1, 2, 2]]), 0, None, [[0], [1]]),
        pytest.param(KIMI, inputs_of([IMAGE] * 2, image_grid_thw=[[1, 3, 5]]), 0, (1, 2), [[0, 1]], id="grid first"),
        pytest.param(QWEN, inputs_of([IMAGE] * 4, image_grid_thw=[[2, 2, 4]]), 0, None, [[2, 4]], id="frames"),
        pytest.param(HUNYUAN, inputs_of([IMAGE] * 8, image_grid_thw=[[1, 4, 4]]), 0, None, [[1, 2], [4, 5]], id="ends"),
        pytest.param(UNLIKE_ITS_TOWER, inputs_of([IMAGE] * 8), 1, (2, 2), [[4, 5], [6, 7]], id="touching, as asked"),
        pytest.param(
            UNLIKE_ITS_TOWER,
            {**inputs_of([IMAGE] * 8), "pixel_values": torch.zeros(2, 3, 16, 16)},
            1,
            None,
            [[4, 5], [6, 7]],
            id="touching, by the number of pictures",
        ),
        pytest.param(UNKNOWN[2], inputs_of([IMAGE] * 6), 0, (2, 3), [[0, 1, 2], [3, 4, 5]], id="unknown, as asked"),
    ],
)
def test_tokens_are_laid_out_on_their_picture(
    config: Any, inputs: dict[str, Tensor], image: int, grid: Any, expected: list[list[float]]
) -> None:
    assert heatmap(config, inputs, image, grid) == expected


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (UNLIKE_ITS_TOWER, inputs_of([*[IMAGE] * 4, BREAK, *[IMAGE] * 4, END])),
        (UNLIKE_ITS_TOWER, inputs_of([IMAGE] * 16)),
        (GEMMA4, inputs_of([BEGIN, *[IMAGE] * 16, END])),
        (INTERNVL, inputs_of([IMAGE] * 16)),
        (LLAVA_NEXT, inputs_of([IMAGE] * 16)),
        *((config, inputs_of([IMAGE] * 16)) for config in UNKNOWN),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_pictures_of_unknown_shape_ask_for_a_grid(config: Any, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"grid: expected \(height, width\).*got None"):
        heatmap(config, inputs, 0, None)


@pytest.mark.parametrize(
    ("config", "row", "grid"),
    [
        pytest.param(PIXTRAL, [*[IMAGE] * 4, 1, *[IMAGE] * 8], (1, 4), id="another picture is larger"),
        pytest.param(PIXTRAL, [*[IMAGE] * 4, 1, *[IMAGE] * 8], (3, 3), id="none has it"),
        pytest.param(PIXTRAL, [IMAGE] * 8, (0, 4), id="empty"),
        pytest.param(UNKNOWN[0], [*[IMAGE] * 4, 1, *[IMAGE] * 4], (2, 2), id="tiles or pictures"),
    ],
)
def test_a_grid_that_need_not_be_that_of_each_picture_is_refused(config: Any, row: list[int], grid: Any) -> None:
    with pytest.raises(ValueError, match=r"^grid: expected .*got \(\d, \d\)"):
        heatmap(config, inputs_of(row), 1, grid)


def test_pictures_of_a_pixtral_tower_are_not_of_one_size() -> None:
    with pytest.raises(ValueError, match="where a picture of LlavaConfig ends"):
        image_ids(PIXTRAL, inputs_of([IMAGE] * 4), [2])
    with pytest.raises(ValueError, match="where a picture of LlavaConfig ends"):
        check_separable(PIXTRAL, inputs_of([IMAGE] * 4))


def test_a_fixed_number_is_that_of_the_tower_where_nothing_else_is_named() -> None:
    config = PaliGemmaConfig(
        image_token_index=IMAGE, vision_config={**TOWER, "model_type": "siglip_vision_model", "image_size": 8}
    )
    assert heatmap(config, inputs_of([IMAGE] * 8), 1, None) == [[4, 5], [6, 7]]


def test_visual_tokens_are_found_in_the_vision_half() -> None:
    phi = Phi4MultimodalConfig(vision_config={"image_token_id": IMAGE})
    ids = torch.tensor([[IMAGE, 1, VIDEO]])
    assert visual_token_mask(phi, ids).tolist() == [[True, False, False]]
    assert visual_token_mask(GEMMA4, ids).tolist() == [[True, False, True]]
    text = Gemma4Config().text_config
    with pytest.raises(
        ValueError, match=r"config: expected a configuration that names the image token .*got Gemma4TextConfig"
    ):
        visual_token_mask(text, ids)
