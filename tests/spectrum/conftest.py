"""BLAS on one thread, as in every operation: small matrices on many threads mostly wait."""

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield
