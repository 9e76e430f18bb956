import multiprocessing
import pickle
import threading
from fractions import Fraction

import pytest

from grpo_trl.rewards.library import answers
from grpo_trl.rewards.library.answers import MathAnswer, final_number, gsm8k_answer, math_answer
from grpo_trl.rewards.worker import CallRaised


SIZE = 200_000
"""Characters; more than linear time in them would be minutes."""


# ---- Final numbers ----
@pytest.mark.parametrize(
    "text, number",
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 72),
        ("#### 1,234", 1234),
        ("#### 12 and 13, not\n#### 5\nor 6", 5),
        ("####-5", -5),
        ("#### $18.00 a day", 18),
        ("so \\boxed{18} and not 20", 18),
        ("\\boxed{17}, no: \\boxed{18}.", 18),
        ("\\boxed{\\$1,234.50}", Fraction(2469, 2)),
        ("\\boxed{\\text{about } 18}", None),  # what stands inside goes to the first brace
        ("\\boxed{1{,}234}", 1234),
        ("\\boxed{1\\,234\\!567}", 1234567),
        ("\\boxed{18", 18),
        ("3 eggs. The answer is 18 dollars and 2 more.", 18),
        ("The Answer Is: **18**.", 18),
        ("The answer is 18. Sorry, the answer is 19. (20)", 19),
        ("The answer is 3. So \\boxed{4}", 4),
        ("\\boxed{4}\n#### 5", 5),
        ("6 * 3 = 18", 18),
        ("It is 18.", 18),
        ("It is 18%", 18),
        ("It is -18", -18),
        ("It is \u221218", -18),
        ("It is -$18.5", Fraction(-37, 2)),
        ("It is $-18", -18),
        ("20-2", 2),  # a minus between numbers is no sign
        ("(20)-2", 2),
        ("x = -2", -2),
        ("It is .5", Fraction(1, 2)),
        ("It is 0018.50", Fraction(37, 2)),
        ("It is 3/4", Fraction(3, 4)),
        ("It is -3/4", Fraction(-3, 4)),
        ("1,2,3", 3),
        ("1,234,56", 56),
        ("12,345,678.25", Fraction(1234567825, 100)),
        ("1e3", 1000),
        ("1.5E-1", Fraction(3, 20)),
        ("3/0", None),
        ("#### none", None),
        ("\\boxed{}", None),
        ("no number", None),
        ("", None),
        ("\u0967\u096e", None),
        ("\uff11\uff18", None),
        ("\u00b2 \u00bd \u2167", None),
        ("\u0130 The answer is 18", 18),
        ("9" * 1001, None),
        ("1e999", 999),  # no power of more than two digits is read
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


HOSTILE = {
    "digits": ("9" * SIZE, None),
    "nines": ("#### " + "9" * SIZE, None),
    "commas": ("1," * SIZE, 1),
    "thousands": ("1" + ",234" * (SIZE // 4) + "5", 2345),
    "points": ("1." * SIZE, Fraction(11, 10)),
    "decimals": ("0." + "3" * SIZE, None),
    "signs": ("-" * SIZE, None),
    "dollars": ("-$" * SIZE, None),
    "slashes": ("1/" * SIZE + "1", 1),
    "powers": ("1e" * SIZE, 10),
    "power": ("1e" + "9" * SIZE, None),
    "marks": ("#" * SIZE, None),
    "boxes": ("\\boxed{" * (SIZE // 7), None),
    "answers": ("answer is " * (SIZE // 10), None),
    "spaces": (" " * SIZE, None),
    "nulls": ("\x00" * SIZE, None),
    "LaTeX": ("\\," * SIZE + "18", 18),
}


@pytest.mark.parametrize("text, number", HOSTILE.values(), ids=HOSTILE)
def test_the_final_number_of_a_long_hostile_text(text, number):
    assert final_number(text) == number


# ---- gsm8k_answer ----
def test_gsm8k_answers_are_compared_as_numbers():
    completions = ["#### 1,234", "so \\boxed{1234.0}", "It is $1234.", "It is 1235.", "2468/2", "none", ""]
    for answer in ("He has 3. #### 1,234", "1234", 1234, 1234.0, "1,234.00"):
        rewards = gsm8k_answer(completions, [answer] * len(completions), prompts=["?"] * len(completions))
        assert rewards == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_gsm8k_answers_are_exact():
    completions = ["0.3333333333333333", "2/6", "9007199254740993"]
    assert gsm8k_answer(completions, ["1/3", "1/3", 9007199254740992]) == [0, 1, 0]


def test_gsm8k_answers_of_messages():
    said = [[{"role": "assistant", "content": "#### 18"}], [{"role": "assistant", "content": None}], []]
    assert gsm8k_answer(completions=said, answer=["#### 18"] * 3) == [1.0, 0.0, 0.0]


def test_an_answer_without_a_number_does_not_apply():
    assert gsm8k_answer(["#### 18"] * 4, [None, "", "eighteen", "#### 18"]) == [None, None, None, 1.0]


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        gsm8k_answer(["1", "2"], ["1"])


# ---- math_answer ----
@pytest.mark.parametrize(
    "completion, solution, expected",
    [
        ("So $x = \\frac{1}{2}$.", "$\\frac{1}{2}$", 1.0),
        ("I get \\boxed{0.5}, not 3.", "\\frac{1}{2}", 1.0),
        ("I get \\boxed{2}.", "\\frac{1}{2}", 0.0),
        ("The answer is 1/2", "0.5", 1.0),
        ("\\boxed{2\\sqrt{3}}", "2\\sqrt{3}", 1.0),
        ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}", 1.0),
        ("\\boxed{2}", "2\\sqrt{3}", 0.0),
        ("\\boxed{(x+1)^2}", "x^2 + 2x + 1", 1.0),
        ("\\boxed{(x+1)^2}", "x^2 + 1", 0.0),
        ("\\boxed{(1, 2]}", "(1,2]", 1.0),
        ("\\boxed{\\{3, 1\\}}", "\\{1, 3\\}", 1.0),
        ("\\boxed{\\text{Tuesday}}", "\\text{Tuesday}", 1.0),
        ("\\boxed{18}", "He eats 3 of the 21 eggs, so that 18 are left.\n#### 18", 1.0),
        ("\\boxed{18}", 18, 1.0),
        ("nothing", "18", 0.0),
        ("", "18", 0.0),
        ("\\boxed{18}", "", None),
        ("\\boxed{18}", None, None),
        ("\\boxed{18}", "they are left with none of them", None),
    ],
)
def test_math_answers_are_compared_as_mathematics(completion, solution, expected):
    said = [{"role": "assistant", "content": completion}]
    assert math_answer(completions=[completion, said], solution=[solution] * 2, prompts=["", ""]) == [expected] * 2


NESTED = "\\frac{1}{" * 1000 + "2" + "}" * 1000
TRICKY = {
    "giant power": "\\boxed{9^{9^{9^{9}}}}",
    "giant power in python": "The answer is 9**9**9**9",
    "factorials": "\\boxed{1000000!!!}",
    "factorial": "\\boxed{99999999999!}",
    "nested fractions": f"\\boxed{{{NESTED}}}",
    "100 kB of LaTeX": "\\boxed{" + "\\sqrt{x} + " * 10_000 + "1}",
    "many boxes": "\\boxed{1+" * 3000,
    "many dollars": "$" * 50_000,
    "digits": "\\boxed{" + "9" * 100_000 + "}",
    "open braces": "\\boxed{" + "{" * 50_000,
    "closing braces": "\\boxed{1" + "}" * 50_000,
    "null bytes": "\\boxed{\x00}" + "\x00" * 1000,
    "surrogates": "\\boxed{\udcff\ud800}",
    "an integral": "\\boxed{\\int_0^{10^{10}} \\sin(x^x)^{x!} dx}",
    "a sum": "\\boxed{\\sum_{n=1}^{10^{10}} \\frac{1}{n!}}",
    "python": "The answer is __import__('os').system('touch /tmp/hacked')",
}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=name, marks=[] if name in ("giant power", "null bytes") else pytest.mark.sandbox)
        for name, text in TRICKY.items()
    ],
)
def test_a_hostile_answer_is_wrong_and_the_next_is_right(text):
    assert MathAnswer(timeout=1.0)([text, "\\boxed{7}"], ["7", "7"]) == [0.0, 1.0]


def test_a_hostile_solution_is_ended_too():
    assert MathAnswer(timeout=0.5)(["\\boxed{7}", "\\boxed{7}"], ["9^{9^{9^{9}}}", "7"]) == [0.0, 1.0]


def test_threads_may_check_at_the_same_time():
    rewards = {}

    def check(number: int) -> None:
        texts = [f"\\boxed{{{n}}}" for n in range(5)] + ["\\boxed{9^{9^{9^{9}}}}"] * (number == 0)
        rewards[number] = MathAnswer(timeout=1.0)(texts, [str(number)] * len(texts))

    threads = [threading.Thread(target=check, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {number: [float(n == number) for n in range(5)] + [0.0] * (number == 0) for number in range(3)}


def in_child(results) -> None:
    results.put((math_answer(["\\boxed{7}", "\\boxed{8}"], ["7", "7"]), id(answers._CHECKERS)))


def test_a_forked_process_has_a_worker_of_its_own():
    math_answer(["7"], ["7"])
    parents = answers._CHECKERS
    worker = next(iter(parents.values())).worker
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=in_child, args=(results,))
    next(iter(parents.values())).lock.acquire()  # as another thread of the parent may at the time of the fork
    child.start()
    next(iter(parents.values())).lock.release()
    assert results.get(timeout=60)[0] == [1.0, 0.0]
    child.join(60)
    assert worker._process.poll() is None
    assert math_answer(["\\boxed{7}"], ["7"]) == [1.0]


def test_one_worker_serves_all_calls_and_starts_again_after_a_timeout():
    reward = MathAnswer(timeout=0.5)
    reward(["7"], ["7"])
    worker = next(iter(answers._CHECKERS.values())).worker
    first = worker._process.pid
    assert MathAnswer(timeout=9)(["7"], ["7"]) == [1.0]
    assert worker._process.pid == first
    assert reward(["\\boxed{9^{9^{9^{9}}}}", "7"], ["7", "7"]) == [0.0, 1.0]
    assert worker._process.pid != first


def test_an_installation_that_fails_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(answers, "_CHECKERS", {})
    monkeypatch.setattr(answers.Worker, "call", broken_call)
    with pytest.raises(CallRaised, match="no module named sympy"):
        math_answer(["7"], ["7"])
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs math-verify: pip install 'math-verify\["):
        math_answer(["7"], ["7"])


def broken_call(worker, call, timeout):
    raise CallRaised("ImportError: no module named sympy")


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_the_timeout_is_checked(timeout):
    with pytest.raises(ValueError, match=f"timeout={timeout} must be a positive number of seconds"):
        MathAnswer(timeout=timeout)


@pytest.mark.parametrize(
    "reward, name", [(math_answer, "math_answer"), (MathAnswer(9), "math_answer"), (gsm8k_answer, "gsm8k_answer")]
)
def test_rewards_have_names_and_can_be_sent_to_another_process(reward, name):
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert reward.__name__ == name
