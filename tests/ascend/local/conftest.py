"""Back ends for tests of single-device ops."""

from __future__ import annotations

import pytest

from moe_triton import backend


@pytest.fixture(params=["cpu", "interpret"], scope="module")
def back_end(request):
    """The reference, then the kernels in Triton's interpreter."""
    cause = backend.unavailable_because(request.param)
    if cause is not None:
        pytest.skip(cause)
    backend.set_backend(request.param)
    yield request.param
    backend.set_backend(None)
