"""One of two processes that train by VGPOTrainer: trl_worker.py CHECKPOINT PICTURES FOLDER."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig

from vgpo_kernels.integrations.trl import VGPOTrainer
from vgpo_train.model import load_processor


class Noting(VGPOTrainer):
    """Keeps what its first batch was weighed by."""

    noted: dict[str, Any] | None = None

    def _generate_single_turn(self, *arguments: Any) -> Any:
        completions, logps = super()._generate_single_turn(*arguments)
        # Completions of this process are all shorter than those of the other one, and ragged.
        longest = 9 - 4 * self.accelerator.process_index
        return [ids[: 1 + (3 * row) % longest] for row, ids in enumerate(completions)], logps

    def _weigh(self, batch: dict[str, Any], focus: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = super()._weigh(batch, focus)
        if self.noted is None:
            self.noted = {"focus": focus, "mask": batch["completion_mask"], **weights}
        return weights


def main(checkpoint: str, pictures: str, folder: str) -> None:
    rows = [json.loads(line) for line in (Path(pictures) / "train.jsonl").read_text().splitlines()]
    data = [
        {
            "prompt": [{"role": "user", "content": row["problem"]}],
            "image": Image.open(Path(pictures) / row["images"][0]).copy(),
        }
        for row in rows
    ]
    trainer = Noting(
        checkpoint,
        lambda completions, **_: [float(len(completion[0]["content"])) for completion in completions],
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            num_generations=4,
            max_completion_length=9,
            max_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=True,
            ddp_backend="gloo",
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=load_processor(checkpoint),
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    names = ("vgpo/focus_mean", "vgpo/token_weight_std", "vgpo/trajectory_weight_std", "entropy")
    logged = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    parameters = {name: value.detach() for name, value in trainer.model.named_parameters()}
    rank = trainer.accelerator.process_index
    result = trainer.noted | {"logged": logged, "before": before, "parameters": parameters}
    torch.save(result, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
