"""Logging never ends a run, and what it shows cannot act."""

import io
import logging
import sys
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from grpo_trl.report import print_completions, write_completions
from grpo_trl.report.tolerant import UNSAFE, clean, tolerated


class Hostile:
    """Has no text, no length, no truth."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __len__ = __bool__ = __str__


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.text(st.characters(categories=["Cs", "Cc", "Cf"])),
    st.decimals(allow_nan=True),
    st.fractions(),
    st.complex_numbers(),
    st.just(10**30),
    st.builds(Hostile),
    st.builds(object),
    st.just(numpy.arange(3)),
)
OBJECTS = st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(OBJECTS, min_size=1, max_size=4), name=st.text() | st.integers() | st.none())
def test_any_objects_under_any_name_are_printed_and_written(tmp_path_factory, cells, name):
    folder = tmp_path_factory.mktemp("any")
    table = {"prompt": ["p"] * len(cells), "completion": cells, name: cells}
    file = io.StringIO()
    print_completions(table, 1, console=Console(file=file, width=80))
    assert "step 1" in file.getvalue()
    assert not UNSAFE.search(file.getvalue())
    write_completions(table, folder / "t.parquet")
    assert pyarrow.parquet.read_table(folder / "t.parquet").num_rows == len(cells)


@given(st.text(st.characters()))
def test_cleaned_text_is_unicode_that_moves_no_cursor_and_keeps_plain_text(text):
    cleaned = clean(text)
    assert not UNSAFE.search(cleaned)
    cleaned.encode()
    assert clean(cleaned) == cleaned
    assert [c for c in text if not UNSAFE.match(c)] == [c for c in text if c in cleaned and not UNSAFE.match(c)]


def test_an_escape_sequence_is_shown_as_characters():
    assert clean("\x1b[2J\u202ea\tb\nc") == "\\x1b[2J\\u202ea\tb\nc"


@pytest.mark.parametrize("value", [Decimal("1e999"), Fraction(1, 3), 10**30, {1: 2}, {"a": {}}])
def test_a_value_that_parquet_lacks_is_written_as_text(tmp_path, value):
    write_completions({"prompt": ["a", "b"], "note": [value, "x"]}, tmp_path / "t.parquet")
    notes = pyarrow.parquet.read_table(tmp_path / "t.parquet")["note"].to_pylist()
    assert notes == [str(value), "x"]


class Stream(io.StringIO):
    """A standard output that fails as given."""

    encoding = "ascii"

    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def write(self, text):
        if self.error:
            raise self.error
        text.encode("ascii")
        return super().write(text)


TABLE = {"prompt": ["\N{ROBOT FACE}"], "completion": ["é"]}


def test_characters_that_an_output_lacks_are_escaped(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    print_completions(TABLE, 1)
    assert "\\U0001f916" in stream.getvalue().replace("\n", "")
    assert "\\xe9" in stream.getvalue()


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr("grpo_trl.report.tolerant._reported", set())
    caplog.set_level(logging.WARNING)
    return caplog


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def test_an_object_that_only_writes_is_an_output(monkeypatch, warnings):
    written = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    print_completions(TABLE, 1)
    assert "step 1" in "".join(written)
    assert not warnings.records


@pytest.mark.parametrize("make", [lambda: None, closed, lambda: Stream(BrokenPipeError()), lambda: Stream(OSError(28))])
def test_an_output_that_fails_is_one_warning(monkeypatch, warnings, make):
    monkeypatch.setattr(sys, "stdout", make())
    for step in range(3):
        print_completions(TABLE, step)
    assert [record.levelname for record in warnings.records] == ["WARNING"]
    assert "Printing completions failed" in warnings.messages[0]


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    for step in range(3):
        write_completions(TABLE, tmp_path / "file" / f"{step}.parquet")
    assert len(warnings.records) == 1
    assert "training continues" in warnings.messages[0]


def test_an_interrupt_is_not_tolerated():
    with pytest.raises(KeyboardInterrupt), tolerated("x"):
        raise KeyboardInterrupt
