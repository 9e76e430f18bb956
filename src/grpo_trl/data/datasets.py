"""What is taken as a dataset, and what to pass instead of anything else."""

from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pyarrow.lib import ArrowException


ROW_FORMATS = (None, "custom", "numpy", "torch")
"""Formats of a dataset in which a row is a dict."""


def as_dataset(data: Any, name: str) -> Any:
    """Return the dataset that was passed as the argument `name`; a list of dicts, one for each row, is made one.

    Raises:
        TypeError: It is one of the usual mistakes; the message says what to pass.
        ValueError: It is an empty list.
    """
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        splits = ", ".join(f"[{split!r}]" for split in data)
        raise TypeError(f"{name} is a {type(data).__name__}; pass one of its splits: {splits}.")
    if isinstance(data, str):
        raise TypeError(f"{name}={data!r} is a name; pass datasets.load_dataset({data!r}, split='train').")
    if hasattr(data, "to_parquet") and hasattr(data, "iloc"):
        raise TypeError(f"{name} is a {type(data).__name__}; pass datasets.Dataset.from_pandas(...) of it.")
    if isinstance(data, Dataset):
        return _by_rows(data)
    if isinstance(data, IterableDataset):
        return data
    if not isinstance(data, list):
        raise TypeError(
            f"{name} is a {type(data).__name__}; pass a datasets.Dataset, a datasets.IterableDataset (of a generator "
            "function: IterableDataset.from_generator), or a list of dicts."
        )
    return _from_rows(data, name)


def _from_rows(data: list[Any], name: str) -> Dataset:
    if not data:
        raise ValueError(f"{name} is an empty list; it must have at least one row.")
    for row, example in enumerate(data):
        if not isinstance(example, dict):
            raise TypeError(
                f"{name}[{row}] is a {type(example).__name__}; a row is a dict such as {{'prompt': '1 + 1 ='}}."
            )
    try:
        return Dataset.from_list(data)
    except (ArrowException, OverflowError) as error:
        raise ValueError(
            f"{name} has a column whose rows are of different kinds, or too large for a table ({error}); give each column "
            "one kind, e.g. text."
        ) from error


def _by_rows(dataset: Dataset) -> Dataset:
    """Return the dataset with rows that are dicts of all columns, whatever format was set on it."""
    shown = dataset.format
    by_rows = shown["type"] in ROW_FORMATS and set(shown["columns"]) == set(dataset.column_names)
    return dataset if by_rows else dataset.with_format(None)


def as_train_dataset(data: Any, max_steps: int) -> Any:
    """Return what is trained on, as `as_dataset` does: nothing, or one dataset.

    Raises:
        ValueError: It is streamed, and `max_steps` does not say how long to train.
    """
    if data is None:
        return None
    dataset = as_dataset(data, "train_dataset")
    if isinstance(dataset, IterableDataset) and max_steps <= 0:
        raise ValueError(
            f"max_steps={max_steps} and train_dataset is streamed, so it does not say how long an epoch is; set max_steps, "
            "e.g. max_steps=1000."
        )
    return dataset


def as_eval_datasets(data: Any) -> Any:
    """Return what is evaluated on, as `as_dataset` does: nothing, one dataset, or several by name."""
    if not isinstance(data, dict):
        return None if data is None else as_dataset(data, "eval_dataset")
    return {name: as_dataset(one, f"eval_dataset[{name!r}]") for name, one in data.items()}
