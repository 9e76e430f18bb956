"""What is taken as a dataset is one of rows, and anything else is refused with what to pass."""

import pytest
from datasets import Dataset

from grpo_trl.data.datasets import as_dataset


ROWS = [{"prompt": f"{i}=", "answer": i} for i in range(3)]


@pytest.mark.parametrize("columns", [None, ["answer"], ["prompt", "answer"]])
@pytest.mark.parametrize("kind", [None, "numpy", "torch", "pandas", "arrow"])
def test_rows_are_dicts_of_all_columns_whatever_format_is_set(kind, columns):
    data = as_dataset(Dataset.from_list(ROWS).with_format(kind, columns=columns), "train_dataset")
    assert [(row["prompt"], int(row["answer"])) for row in data] == [(row["prompt"], row["answer"]) for row in ROWS]
    assert data[0].keys() == ROWS[0].keys()


def test_a_transform_of_the_users_stays():
    data = Dataset.from_list(ROWS).with_transform(lambda batch: {"prompt": [text * 2 for text in batch["prompt"]]})
    assert as_dataset(data, "train_dataset")[1] == {"prompt": "1=1="}


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}],
        [{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": "one"}],
        [{"prompt": "a", "answer": 10**40}],
    ],
)
def test_rows_that_are_no_table_are_refused(rows):
    with pytest.raises(ValueError, match="eval_dataset has a column whose rows are of different kinds, or too large"):
        as_dataset(rows, "eval_dataset")
