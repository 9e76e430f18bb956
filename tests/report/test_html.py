"""The page about a run, in a browser."""

import time

import pytest

from grpo_trl.report import Run, RunLog, write_report
from grpo_trl.report.groups import MOST_CHARACTERS, MOST_COMPLETIONS, stride
from grpo_trl.report.html import planned_and_measured

from .browser import chromium, complaints, opened, requests


HOSTILE = (
    "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/x' onerror='window.hacked = 1'>"
    "</script><!-- <style>body{display:none}</style> \x1b[2J\u202e &lt;b&gt; ${window.hacked=1}"
)


def logged_run(folder, steps=4, groups=2, size=4, text="it is", keeps_all=False, evaluated=False):
    """A run whose rewards are 0 in the first half of a group, and 1 in the second."""
    log = RunLog(folder, keeps_all)
    config = {"learning_rate": 1e-6 if folder.name == "one" else 2e-6, "num_generations": size}
    log.start(0, steps, {"run_config.json": config, "plan.json": {"summary": {"optimizer steps": steps}}})
    for step in range(1, steps + 1):
        log.entry(
            step, {"reward": step / steps, "rewards/right/mean": 0.5, "kl": 0.1, "time/sampling": 1.0, HOSTILE: 1.0}
        )
        log.entry(step, {"eval_reward": step / 10})
        if evaluated:
            answers = [f"so {text} 0", f"so {text} {step}"]
            columns = {"prompt": ["even", "odd"], "completion": answers, "right": [0.5, step / 10]}
            log.evaluation(step, "eval", columns, 1)
        rows = range(groups * size)
        rewards = [float(row % size >= size // 2) for row in rows]
        log.completions(
            step,
            {
                "prompt": [f"question {step}.{row // size}" for row in rows],
                "completion": [f"{text} {row}" for row in rows],
                "right": rewards,
                "advantage": [2 * reward - 1 for reward in rewards],
            },
            size,
        )
    log.end(steps)
    return folder


@pytest.fixture(scope="module")
def browser():  # its tests take seconds each, and are marked slow
    pytest.importorskip("plotly")
    with chromium() as driver:
        yield driver


def count(browser, selector):
    return len(browser.find_elements("css selector", selector))


def fill(browser, element, value):
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        element,
        str(value),
    )


def prompts(browser):
    return [element.get_attribute("textContent") for element in browser.find_elements("css selector", ".prompt")]


@pytest.mark.slow
def test_charts_are_drawn_without_a_request_or_a_complaint(tmp_path, browser):
    opened(browser, write_report([logged_run(tmp_path / "one")], tmp_path / "report.html"))
    browser.execute_script("document.getElementById('charts').scrollIntoView()")
    deadline = time.monotonic() + 30
    while count(browser, "#charts .js-line") < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    charts = browser.find_elements("css selector", "#charts .chart")
    assert [chart.get_attribute("data-title") for chart in charts] == [
        "Reward",
        "Held-out reward",
        "Rewards by function",
        "KL to the reference",
        "Seconds per step by phase",
    ]
    assert count(browser, "#charts .js-line") >= 3
    browser.execute_script("document.getElementById('theme').click()")
    assert complaints(browser) == []
    assert {url.split("/")[-1] for url in requests(browser)} == {"report.html"}


@pytest.mark.slow
def test_the_browser_of_completions_filters(tmp_path, browser):
    opened(browser, write_report([logged_run(tmp_path / "one")], tmp_path / "report.html"))
    assert count(browser, ".group") == 8
    assert count(browser, ".completion") == 32
    fill(browser, "f-step", 3)
    assert sorted(prompts(browser)) == ["question 3.0", "question 3.1"]
    fill(browser, "f-text", "3.1")
    assert prompts(browser) == ["question 3.1"]
    fill(browser, "f-min", 0.5)
    assert (count(browser, ".completion"), count(browser, ".completion.hidden")) == (4, 2)
    fill(browser, "f-min", 2)
    assert count(browser, ".group") == 0
    assert complaints(browser) == []


@pytest.mark.slow
def test_evaluations_show_what_changed_between_the_first_and_the_last(tmp_path, browser):
    run = logged_run(tmp_path / "one", evaluated=True, text=HOSTILE)
    opened(browser, write_report([run], tmp_path / "report.html"))
    assert count(browser, ".pair") == 2
    heads = [e.get_attribute("textContent") for e in browser.find_elements("css selector", "#pairs header")]
    assert heads == ["reward 0.1 → 0.4", "reward 0.5 → 0.5"]  # the most improved first
    texts = [e.get_attribute("textContent") for e in browser.find_elements("css selector", "#pairs pre")]
    assert [text[-1] for text in texts] == ["1", "4", "0", "0"]
    shared = browser.find_element("css selector", "#pairs .same").get_attribute("textContent")
    assert shared == texts[0][:-1]
    browser.execute_script("document.getElementById('e-moved').click()")
    assert count(browser, ".pair") == 1
    fill(browser, "e-text", "even")
    assert count(browser, ".pair") == 0
    assert browser.execute_script("return window.hacked") is None
    assert complaints(browser) == []


def test_evaluations_are_thinned_out_to_their_part_of_the_page():
    pairs = [{"prompt": "p" * 100, "first": [{"text": "x" * 20_000}], "last": [{"text": "y"}]} for _ in range(1000)]
    kept = pairs[:: stride(pairs, MOST_COMPLETIONS // 4, MOST_CHARACTERS // 4)]
    assert MOST_CHARACTERS / 8 < sum(len(pair["first"][0]["text"]) + 101 for pair in kept) <= MOST_CHARACTERS / 4


@pytest.mark.slow
def test_advantages_are_coloured_by_sign(tmp_path, browser):
    opened(browser, write_report([logged_run(tmp_path / "one")], tmp_path / "report.html"))
    colours = {
        browser.execute_script("return getComputedStyle(arguments[0]).backgroundColor", element)
        for element in browser.find_elements("css selector", ".completion")
    }
    assert len(colours) == 2


@pytest.mark.slow
def test_hostile_text_is_shown_as_text(tmp_path, browser):
    run = logged_run(tmp_path / "one", text=HOSTILE)
    opened(browser, write_report([run], tmp_path / "report.html"))
    browser.execute_script("document.getElementById('others').open = true")
    text = browser.find_element("css selector", ".completion pre").get_attribute("textContent")
    assert text.startswith("<script>window.hacked = 1</script><img")
    assert "\\x1b[2J\\u202e &lt;b&gt;" in text
    assert browser.execute_script("return window.hacked") is None
    assert count(browser, ".completion img, .completion script, main style, main script") == 0
    assert complaints(browser) == []
    assert {url.split("/")[-1] for url in requests(browser)} == {"report.html"}


@pytest.mark.slow
def test_several_runs_are_compared(tmp_path, browser):
    runs = [logged_run(tmp_path / name) for name in ("one", "two")]
    opened(browser, write_report(runs, tmp_path / "report.html"))
    assert count(browser, ".run") == 2
    changed = browser.find_elements("css selector", "#options tr.changed td:first-child")
    assert [cell.get_attribute("textContent") for cell in changed] == ["learning_rate"]
    fill(browser, "f-run", 1)
    assert count(browser, ".group") == 8


@pytest.mark.slow
def test_a_large_run_is_a_page_of_bounded_size(tmp_path, browser):
    pytest.importorskip("plotly")
    run = logged_run(tmp_path / "one", steps=10, groups=200, size=8, text="x" * 1_000, keeps_all=True)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 11, "unfinished')
    page = write_report([run], tmp_path / "report.html")
    assert page.stat().st_size < 20 * 2**20
    opened(browser, page)
    shown = browser.execute_script("return groups.reduce((count, group) => count + group.rows.length, 0)")
    kept = browser.execute_script("return DATA.runs[0].completion_count")
    assert kept == 16_000
    assert MOST_COMPLETIONS / 2 <= shown <= MOST_COMPLETIONS
    assert count(browser, ".group") == 20


def test_a_line_of_a_megabyte_is_cut(tmp_path):
    pytest.importorskip("plotly")
    run = logged_run(tmp_path / "one", steps=1, groups=1, text="y" * 1_000_000)
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "(1,000,002 characters)" in page
    assert "y" * 20_001 not in page


@pytest.mark.parametrize("accelerators, measured", [([{"name": "H100", "memory_gib": 80}], 3.5), ([], None)])
def test_memory_is_compared_with_the_plan_where_a_gpu_counts_it(tmp_path, accelerators, measured):
    log = RunLog(tmp_path)
    summary = {"peak memory (GiB)": 3.0, "seconds per optimizer step": 2.0}
    environment = {"hardware": {"accelerators": accelerators}}
    log.start(0, 3, {"environment.json": environment, "plan.json": {"summary": summary}})
    for step, seconds in ((1, 9.0), (2, 2.5), (3, 2.4)):
        log.entry(step, {"memory/peak_gib": 3.5, "step_time": seconds})
    assert planned_and_measured(Run.read(tmp_path)) == [
        ("peak memory (GiB)", 3.0, measured),
        ("seconds per optimizer step", 2.0, 2.5),
    ]
