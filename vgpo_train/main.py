"""Trains a vision-language model by GRPO or VGPO: `deepspeed vgpo_train/main.py --config FILE [key=value ...]`."""

import argparse
import logging
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # `deepspeed vgpo_train/main.py` puts this folder on the path; its parent, the checkout, is what imports need.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from vgpo_train.config import ConfigError, TrainConfig, load_config


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs the training; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vgpo_train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, such as vgpo_train/configs/quickstart.yaml")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, such as optim.lr=1e-5")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    rank = os.environ.get("RANK", "0")
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        if rank == "0":  # every rank reads the same file
            print(f"error: {error}", file=sys.stderr)
        return 2
    return _train(config)


def _train(config: TrainConfig) -> int:
    if "RANK" not in os.environ:
        print("error: start it with: deepspeed vgpo_train/main.py --config FILE [key=value ...]", file=sys.stderr)
        return 2
    # Imported late: a mistake in the configuration shows at once, before seconds of imports.
    import torch

    from vgpo_train.data import DataError
    from vgpo_train.model.engine import start_distributed
    from vgpo_train.run import distributed
    from vgpo_train.trainer import Trainer

    start_distributed()
    status = 0
    try:
        summary = Trainer(config).run()
    except (ConfigError, DataError) as error:  # every rank raises the same
        status, message = 2, f"error: {error}"
    else:
        message = f"results in {config.output_dir}: {summary}"
    if distributed.is_main():
        print(message, file=sys.stderr if status else sys.stdout, flush=True)
    # The launcher ends all ranks once one has left with an error: none leaves before the main one has spoken.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
