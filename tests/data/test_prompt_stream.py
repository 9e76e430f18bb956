"""Streams: the prompts of a set, read one after the other, from any position."""

import copy
import io
import itertools
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from grpo_trl.data.prompt_set import EpochOrder, PromptSet
from grpo_trl.data.prompt_stream import CHECKED, PromptStream, StreamOrder
from grpo_trl.data.prompts import PromptLimit
from grpo_trl.types import Ranks
from tests.helpers.models import make_tokenizer


UNLIMITED = PromptLimit(None, 8, "error")
TEXTS = [letter + digit for letter in "abcdefghi" for digit in "012"]


def stream_of(texts: list, shards: int = 1) -> IterableDataset:
    return Dataset.from_dict({"prompt": texts, "answer": list(range(len(texts)))}).to_iterable_dataset(shards)


def endless() -> IterableDataset:
    return IterableDataset.from_generator(lambda: ({"prompt": TEXTS[i % len(TEXTS)]} for i in itertools.count()))


def prompts_of(dataset: IterableDataset, limit: PromptLimit = UNLIMITED, **options) -> PromptStream:
    return PromptStream(dataset, make_tokenizer(), limit, **options)


def order_of(dataset: IterableDataset, size: int = 4, shuffle: bool = False, limit=UNLIMITED) -> StreamOrder:
    return StreamOrder(prompts_of(dataset, limit), size, seed=5, shuffle=shuffle)


def batches(order, numbers, size: int = 4) -> list[list]:
    return [[(p.example, p.ids, p.row) for p in order.prompts(number, range(size))] for number in numbers]


def saved(state: dict) -> dict:
    """As a checkpoint holds it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


STREAMS = {
    "a generator": lambda: IterableDataset.from_generator(lambda: ({"prompt": text} for text in TEXTS)),
    "shards": lambda: stream_of(TEXTS, 3),
    "mapped": lambda: stream_of(TEXTS).map(lambda row: {"prompt": row["prompt"] + "="}),
    "filtered": lambda: stream_of(TEXTS).filter(lambda row: "1" not in row["prompt"]),
    "shuffled by the user": lambda: stream_of(TEXTS, 2).shuffle(seed=1, buffer_size=6),
    "several": lambda: concatenate_datasets([stream_of(TEXTS[:9]), stream_of(TEXTS[9:])]),
    "several with weights": lambda: interleave_datasets(
        [stream_of(TEXTS[:14]), stream_of(TEXTS[14:])], probabilities=[0.7, 0.3], seed=2
    ),
    "without an end": endless,
}


def test_a_stream_that_is_not_shuffled_is_trained_on_like_the_set_of_its_rows():
    for size in (1, 4, 5, 27):
        in_set = EpochOrder(
            PromptSet(Dataset.from_dict({"prompt": TEXTS}), make_tokenizer(), UNLIMITED), size, 5, False
        )
        streamed = order_of(IterableDataset.from_generator(lambda: ({"prompt": text} for text in TEXTS)), size)
        numbers = range(3 * len(TEXTS) // size)
        assert batches(streamed, numbers, size) == batches(in_set, numbers, size)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", STREAMS)
def test_a_position_is_resumed_exactly(name, shuffle):
    """From every generation batch, over the ends of passes, with generation batches held that were read before."""
    numbers = range(12)
    whole = batches(order_of(STREAMS[name](), shuffle=shuffle), numbers)
    assert all(one != other for one, other in itertools.pairwise(whole))
    for position in (1, 5, 6, 8):
        order = order_of(STREAMS[name](), shuffle=shuffle)
        assert batches(order, range(position)) == whole[:position]
        order.forget(before=position - 1)
        order.digest(position + 1)  # sampled ahead
        state = saved(order.state_dict())
        resumed = order_of(STREAMS[name](), shuffle=shuffle)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert batches(resumed, numbers[position - 1 :]) == whole[position - 1 :]


def test_a_stream_knows_its_position_unless_a_buffer_shuffles_it(caplog):
    read = []

    def rows():
        for number, text in enumerate(TEXTS):
            read.append(number)
            yield {"prompt": text}

    def resumed(shuffle):
        order = order_of(IterableDataset.from_generator(rows), shuffle=shuffle)
        batches(order, range(4))
        order.forget(before=3)
        state = order.state_dict()
        order = order_of(IterableDataset.from_generator(rows), shuffle=shuffle)
        order.load_state_dict(state)
        order.digest(4)

    resumed(shuffle=False)
    assert "is read again" not in caplog.text
    resumed(shuffle=True)
    assert "train_dataset is read again up to row 12" in caplog.text
    assert "shuffle_dataset=False resumes at once" in caplog.text


def test_a_shuffled_stream_has_another_order_in_each_pass_and_all_of_its_rows():
    order = order_of(stream_of(TEXTS[:24]), size=8, shuffle=True)
    passes = [
        [row["answer"] for batch in batches(order, range(3 * n, 3 * n + 3), 8) for row, _, _ in batch] for n in (0, 1)
    ]
    assert all(sorted(one) == list(range(24)) for one in passes)
    assert passes[0] != passes[1] != list(range(24))


def test_another_stream_is_refused_where_a_run_resumes():
    order = order_of(stream_of(TEXTS))
    batches(order, range(3))
    order.forget(before=2)
    other = order_of(stream_of(TEXTS[::-1]))
    other.load_state_dict(order.state_dict())
    with pytest.raises(ValueError, match="does not stream the prompts of generation batch 2 again"):
        other.digest(2)


def test_only_the_generation_batches_in_use_are_held():
    order = order_of(endless())
    for number in range(30):
        order.digest(number)
        order.forget(before=number)
        assert list(order._kept) == [number]


def test_training_again_starts_at_the_beginning():
    order = order_of(stream_of(TEXTS), shuffle=True)
    first = batches(order, range(5))
    order.forget(before=4)
    assert batches(order, range(5)) == first


def test_a_stream_that_serves_twice_has_two_positions():
    """Trained on and evaluated on at the same time, and iterated by the user."""
    dataset = stream_of(TEXTS)
    order, alone = order_of(dataset), order_of(stream_of(TEXTS))
    own = iter(dataset)
    for number in range(4):
        next(own)
        evaluated = [p.row for share in prompts_of(dataset).shares(None, Ranks()) for p in share.prompts]
        assert evaluated == list(range(len(TEXTS)))
        assert batches(order, [number]) == batches(alone, [number])
    assert copy.copy(order).state_dict() == alone.state_dict()


def test_ranks_share_a_stream_as_they_share_a_set():
    in_set = PromptSet(Dataset.from_dict({"prompt": TEXTS}), make_tokenizer(), UNLIMITED)
    streamed = prompts_of(IterableDataset.from_generator(lambda: ({"prompt": text} for text in TEXTS)))
    for world_size, size in itertools.product((1, 2, 5), (5, 10, 20, 40)):
        rows = []
        for rank in range(world_size):
            ranks = Ranks(rank, world_size)
            shares = list(streamed.shares(size, ranks))
            assert shares == list(in_set.shares(size, ranks))
            rows += [index for share in shares for index in share.indices]
        assert sorted(rows) == list(range(len(TEXTS)))


# ---- What is refused, and what does not fit ----
TIGHT = {policy: PromptLimit(3, 7, policy) for policy in ("error", "drop", "truncate_left")}
RAGGED = ["abc", "a", "abcdef", "ab", "abcd", "b"]


def test_what_does_not_fit_is_treated_as_in_a_set(caplog):
    for policy in ("drop", "truncate_left"):
        caplog.clear()
        in_set = PromptSet(Dataset.from_dict({"prompt": RAGGED}), make_tokenizer(), TIGHT[policy])
        streamed = prompts_of(IterableDataset.from_generator(lambda: ({"prompt": t} for t in RAGGED)), TIGHT[policy])
        (expected,), (actual,) = in_set.shares(None, Ranks()), streamed.shares(None, Ranks())
        assert actual == expected
        assert "row 2 of the stream has 6 tokens, and 3 fit" in caplog.text
        assert caplog.text.count("of the stream") == 1


def test_generation_batches_are_full_where_prompts_are_dropped():
    order = order_of(stream_of(RAGGED), size=2, limit=TIGHT["drop"])
    rows = [[row for _, _, row in batch] for batch in batches(order, range(4), 2)]
    assert rows == [[0, 1], [3, 5], [0, 1], [3, 5]]


def test_what_does_not_fit_among_the_first_is_an_error_before_training_and_later_when_it_is_read():
    with pytest.raises(
        ValueError, match=r"row 2 of the stream has 6 tokens.*prompt_overflow='drop' or 'truncate_left'"
    ):
        prompts_of(stream_of(RAGGED), TIGHT["error"])
    order = order_of(stream_of(["a"] * CHECKED + ["abcd"] * 4), limit=TIGHT["error"])
    batches(order, range(4))
    with pytest.raises(ValueError, match="row 16 of the stream has 4 tokens"):
        order.digest(4)


def test_a_stream_shorter_than_a_generation_batch_is_refused():
    with pytest.raises(ValueError, match="ends after 3 prompts and a generation batch needs 4"):
        order_of(stream_of(TEXTS[:3])).digest(0)


def test_prompts_that_do_not_fill_a_generation_batch_are_left_out(caplog):
    caplog.set_level(logging.INFO, logger="grpo_trl")
    order = order_of(stream_of(TEXTS[:6]))
    assert [[row for _, _, row in batch] for batch in batches(order, range(3))] == [[0, 1, 2, 3]] * 3
    assert caplog.text.count("The last 2 prompts of train_dataset do not fill a generation batch of 4") == 1


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (IterableDataset.from_generator(lambda: iter([])), "my_set is empty"),
        (
            IterableDataset.from_generator(lambda: iter([{"question": "a"}])),
            r"\['question'\], and none is named 'prompt'",
        ),
        (stream_of(["a", ""]), r"my_set\[1\]\['prompt'\] has no tokens"),
        (stream_of(["a", "zz"]), r"my_set\[1\]\['prompt'\] has token 40"),
    ],
)
def test_a_stream_that_cannot_serve_is_refused_by_its_first_examples(dataset, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(dataset, name="my_set", num_embeddings=40)


def test_only_the_prompt_is_read_where_other_columns_are_dropped():
    prompts = prompts_of(stream_of(TEXTS), prompt_only=True)
    assert prompts.column_names == ["prompt"]
    (share,) = prompts.shares(None, Ranks())
    assert share.prompts[0].example == {"prompt": "a0"}
