import errno

import pytest
import torch

from grpo_trl.model_utils import ran_out_of_memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("made up"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_missing_memory_is_recognized_whoever_asked_for_it(error):
    assert ran_out_of_memory(error)


def test_the_allocator_of_the_host_is_recognized_by_the_error_that_it_raises():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left on device"), ValueError("memory")]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not ran_out_of_memory(error)
