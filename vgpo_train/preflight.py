"""What a run will do, and what forbids it, known before a model is loaded."""

import functools
import logging
import math

from tqdm import tqdm

from vgpo_train.config import ConfigError, DataConfig, TrainConfig
from vgpo_train.data import DataError, Examined, PictureDataset, PromptCollator, examine, report, unusable
from vgpo_train.model import layer_count
from vgpo_train.run import distributed

logger = logging.getLogger(__name__)


def total_steps(config: TrainConfig, samples: int) -> int:
    """Returns how many steps the run takes over this many samples."""
    if config.steps is not None:
        return config.steps
    return max(1, math.floor(config.epochs * samples / config.rollout.prompts))


def check_sizes(config: TrainConfig, samples: int, world: int) -> None:
    """Raises ConfigError unless the prompts of a step can differ and every rank gets as many rows of every update.

    Args:
        config: of the run.
        samples: usable rows of the training data.
        world: number of processes.
    """
    if config.rollout.prompts > samples:
        raise ConfigError(
            f"rollout.prompts: expected at most the {samples} usable rows of data.train ({config.data.train}), "
            f"got {config.rollout.prompts}"
        )
    rows = config.optim.update_prompts * config.rollout.completions
    if rows % world:
        raise ConfigError(
            f"optim.update_prompts x rollout.completions: expected a multiple of the {world} processes, got {rows}"
        )


def check_layers(config: TrainConfig) -> None:
    """Raises ConfigError unless `focus.layers` are layers of the checkpoint, each given once."""
    layers, count = (
        config.focus.layers,
        layer_count(config.model.path, trust_remote_code=config.model.trust_remote_code),
    )
    if isinstance(layers, str) or count is None:
        return
    for layer in layers:
        if not -count <= layer < count:
            raise ConfigError(f"focus.layers: expected numbers from {-count} to {count - 1}, got {layer}")
    if len({layer % count for layer in layers}) < len(layers):
        raise ConfigError(f"focus.layers: expected each of the {count} layers at most once, got {layers}")


def open_datasets(config: DataConfig) -> dict[str, PictureDataset]:
    """Returns the data sets of a run by the keys that name them."""
    datasets = {"data.train": PictureDataset(config.train, columns=config.columns)}
    if config.test:
        columns = config.columns if config.test_columns is None else config.test_columns
        datasets["data.test"] = PictureDataset(config.test, config.test_limit, columns)
    return datasets


def usable(datasets: dict[str, PictureDataset], collator: PromptCollator, invalid: str) -> dict[str, PictureDataset]:
    """Returns the data sets less the rows that cannot be used, after each row has been read once.

    Args:
        datasets: by the keys that name them.
        collator: makes the prompts.
        invalid: of `data.invalid`: refuse | drop.

    Raises:
        DataError: there are such rows and they are not to be dropped, or nothing else is left; every rank raises it.
    """
    found: dict[str, list[Examined]] = {}
    for key, data in datasets.items():
        own = range(distributed.rank(), len(data), distributed.world_size())
        bar = tqdm(own, f"check {key}", disable=not distributed.is_main(), unit="row", dynamic_ncols=True)
        rows = distributed.gather_lists(distributed.together(functools.partial(examine, data, collator, bar)))
        found[key] = unusable(rows)
        if distributed.is_main() and not any(row.images for row in rows):
            logger.warning("%s=%s: no row has a picture, so every focus is 0", key, data.name)
    reports = [report(f"{key}={datasets[key].name}", len(datasets[key]), bad) for key, bad in found.items() if bad]
    if reports and invalid == "refuse":
        raise DataError("\n".join([*reports, "mend these rows, or leave them out with data.invalid=drop"]))
    for text in reports if distributed.is_main() else ():
        logger.warning("%s\nthese rows are left out", text)
    return {key: data.without({row.place for row in found[key]}) for key, data in datasets.items()}
