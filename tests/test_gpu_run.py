from tests.gpu.run import failures, outcomes


PRINTED = """\
[gw0] [ 25%] PASSED tests/gpu/test_attention.py::test_flash[64, grouped]
[gw1] [ 50%] FAILED tests/gpu/test_decoding.py::test_greedy[gemma2 windowed]
[gw0] [ 75%] SKIPPED tests/gpu/test_training.py::test_a_launched_run_trains[zero3]
"""
SUMMARY = """\
FAILED tests/gpu/test_decoding.py::test_greedy[gemma2 windowed] - assert [1, 2] == [1, 3]
==== 1 failed, 1 passed, 1 skipped in 3.00s ====
"""


def test_failures_are_listed_with_their_messages():
    found = outcomes(PRINTED + SUMMARY)
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == {"tests/gpu/test_decoding.py::test_greedy[gemma2 windowed]": "assert [1, 2] == [1, 3]"}
    assert failures(found).splitlines() == [
        "1 GPU tests failed, 1 passed, 1 were skipped.",
        "==== 1 failed, 1 passed, 1 skipped in 3.00s ====",
        "- `tests/gpu/test_decoding.py::test_greedy[gemma2 windowed]`: assert [1, 2] == [1, 3]",
    ]


def test_tests_that_were_ended_keep_what_is_known():
    assert list(outcomes(PRINTED)["failed"].values()) == [""]
