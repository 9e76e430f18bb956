import io
import random
import sys

import matplotlib
import pyarrow.parquet
import pytest
from datasets import Dataset
from rich.console import Console

from grpo_trl.report import CURVES, merge_tables, plot_run, print_completions, write_completions


TABLE = {
    "prompt": ["what is 1+1", "what is 2+2"],
    "completion": ["it is two", "it is five"],
    "correct": [1.0, float("nan")],
    "length": [0.123456, 2.0],
    "parsed": ["2", None],
}


@pytest.fixture(autouse=True)
def settings_of_matplotlib():
    with matplotlib.rc_context():
        yield


def printed(table: dict, step: int = 3, limit: int | None = None, width: int = 120) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    print_completions(table, step, limit, console)
    return console.export_text()


def test_the_table_shows_prompts_completions_and_rewards():
    lines = printed(TABLE, step=17).splitlines()
    assert any("step 17" in line for line in lines)
    assert all(any(name in line for line in lines) for name in TABLE)
    first = next(line for line in lines if "what is 1+1" in line)
    assert [cell in first for cell in ("it is two", " 1 ", "0.123 ", " 2 ")] == [True] * 4
    second = next(line for line in lines if "what is 2+2" in line)
    assert [cell in second for cell in ("it is five", " nan ", " 2 ", " None ")] == [True] * 4


def test_the_table_goes_to_standard_output_by_default(capsys):
    print_completions(TABLE, step=3)
    captured = capsys.readouterr()
    assert "two" in captured.out
    assert captured.err == ""


def test_a_conversation_is_shown_as_roles_and_contents():
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]
    text = printed({"prompt": [prompt], "completion": [[{"role": "assistant", "content": "two"}]]})
    assert [line in text for line in ("system: be brief", "user: 1+1", "two")] == [True] * 3
    assert "assistant" not in text
    assert "{" not in text


def rows_of(text: str) -> list[int]:
    return [i for i in range(20) if f"row{i:02d}" in text]


def test_the_limit_draws_rows_without_touching_the_global_random_state():
    table = {"prompt": [f"row{i:02d}" for i in range(20)], "completion": ["x"] * 20}
    state = random.getstate()
    drawn = [rows_of(printed(table, step, limit=4)) for step in range(5)]
    assert random.getstate() == state
    assert [len(rows) for rows in drawn] == [4] * 5
    assert len(set(map(tuple, drawn))) > 1
    assert [rows_of(printed(table, step, limit=4)) for step in range(5)] == drawn


@pytest.mark.parametrize("limit, shown", [(None, 20), (20, 20), (50, 20), (0, 0), (-1, 0)])
def test_a_limit_beyond_the_table_shows_all_of_it(limit, shown):
    table = {"prompt": [f"row{i:02d}" for i in range(20)], "completion": ["x"] * 20}
    assert len(rows_of(printed(table, limit=limit))) == shown


@pytest.mark.parametrize("text", ["[bold]", "[/]", "[red]x[/red]", "[link=a]b", ":smile:", "\\[x]"])
def test_text_that_looks_like_markup_is_printed_as_it_stands(text):
    shown = printed({"prompt": [text], "completion": [text], text: [text]}, width=200)
    assert shown.count(text) == 4


def test_completions_make_a_round_trip_through_a_file(tmp_path):
    path = tmp_path / "a" / "b" / "completions.parquet"
    table = {
        "step": [3, 3],
        "prompt": [[{"role": "user", "content": "é\n"}], [{"role": "user", "content": ""}]],
        "completion": ["[bold]", ""],
        "reward": [0.1, None],
    }
    write_completions({"prompt": ["of the log before"]}, path.with_name("earlier.parquet"))
    write_completions(table, path)
    assert Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")).to_dict() == table


LOG = [
    {"step": 1, "loss": 0.1, "reward": 0.5, "kl": 0.0},
    {"step": 2, "loss": 0.1, "reward": 0.75, "kl": float("nan")},
    {"step": 2, "eval_reward": 0.6},
    {"step": 2, "train_runtime": 1.0},
]


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "a" / "curves.png"
    plot_run(LOG, path, title="a run with [bold] and $")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("names", [["reward"], [name for name, _ in CURVES]])
def test_every_number_of_curves_can_be_drawn(tmp_path, monkeypatch, names):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, *data, **kw: drawn.append([list(xs) for xs in data]))
    log = [{"step": step, **dict.fromkeys(names, step / 2)} for step in (1, 2, 3)]
    plot_run([*log, {"step": 3, "train_loss": 0.0}], str(tmp_path / "curves.png"))
    assert drawn == [[[1, 2, 3], [0.5, 1.0, 1.5]]] * len(names)


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": 0.5}]])
def test_a_log_without_curves_is_refused(tmp_path, log):
    with pytest.raises(ValueError, match="train for at least logging_steps steps"):
        plot_run(log, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_the_settings_and_the_backend_of_matplotlib_alone(tmp_path, monkeypatch):
    def settings() -> dict[str, object]:
        return {name: matplotlib.rcParams._get(name) for name in matplotlib.rcParams}  # does not choose a backend

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    before = settings()
    plot_run(LOG, tmp_path / "curves.png")
    assert settings() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_tables_of_ranks_are_joined_and_what_one_lacks_is_none():
    first = {"prompt": ["a", "a"], "reward": [1.0, 2.0], "note": ["x", "y"]}
    second = {"prompt": ["b", "a"], "reward": [3.0, 4.0], "other": [5, 6]}
    assert merge_tables([first, second]) == {
        "prompt": ["a", "a", "b", "a"],
        "reward": [1.0, 2.0, 3.0, 4.0],
        "note": ["x", "y", None, None],
        "other": [None, None, 5, 6],
    }
    assert merge_tables([first, second], unique_prompts=True)["reward"] == [1.0, 3.0]


def test_conversations_are_told_apart_by_what_they_say():
    prompts = [[{"role": "user", "content": text}] for text in ("a", "b", "a")]
    assert merge_tables([{"prompt": prompts}], unique_prompts=True)["prompt"] == prompts[:2]


def test_a_column_of_mixed_kinds_is_written_as_text(tmp_path):
    write_completions({"prompt": ["a", "b", "c"], "note": [1, "x", None]}, tmp_path / "t.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet")["note"].to_pylist() == ["1", "x", None]
