"""A few of the kills that `make soak` makes hundreds of."""

import pytest

from tests.helpers.soak import KINDS, soak


@pytest.mark.slow
def test_a_run_that_is_killed_six_times_ends_as_one_that_is_not():
    done = soak(kills=6, seed=1)
    assert sum(done.ended[kind] for kind in KINDS) == 6
    assert done.finished
