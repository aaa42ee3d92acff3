"""The data sets of a run, less what cannot be used; the ranks share the work of finding that."""

import functools
import logging

from tqdm import tqdm

from vgpo_train import distributed
from vgpo_train.config import DataConfig
from vgpo_train.data import DataError, Examined, PictureDataset, PromptCollator, examine, report, unusable

logger = logging.getLogger(__name__)


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
