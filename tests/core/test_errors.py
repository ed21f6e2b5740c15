"""Errors that say that memory has run out, and whose code failed."""

from __future__ import annotations

import pytest
import torch

from robench.core.errors import RobenchError, out_of_memory, within


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_whether_a_smaller_batch_might_do(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


def test_an_error_in_the_code_of_a_plug_in_says_whose_it_is_once() -> None:
    with pytest.raises(ZeroDivisionError) as found, within("defense", "outer"), within("attack", "mine"):
        raise ZeroDivisionError
    (note,) = found.value.__notes__
    assert "attack 'mine'" in note
    with pytest.raises(RobenchError) as told, within("attack", "mine"):
        raise RobenchError("expected `steps` to be at least 1")
    assert not hasattr(told.value, "__notes__")
