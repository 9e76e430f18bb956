"""What is taken as a dataset, and what to pass instead of anything else."""

from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict


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
    if not isinstance(data, list):
        return data
    if not data:
        raise ValueError(f"{name} is an empty list; it must have at least one row.")
    for row, example in enumerate(data):
        if not isinstance(example, dict):
            raise TypeError(
                f"{name}[{row}] is a {type(example).__name__}; a row is a dict such as {{'prompt': '1 + 1 ='}}."
            )
    return Dataset.from_list(data)


def as_eval_datasets(data: Any) -> Any:
    """Return what is evaluated on, as `as_dataset` does: nothing, one dataset, or several by name."""
    if not isinstance(data, dict):
        return None if data is None else as_dataset(data, "eval_dataset")
    return {name: as_dataset(one, f"eval_dataset[{name!r}]") for name, one in data.items()}
