"""Fixtures of the adapter tests."""

import pytest

from csdiff.adapters import ADAPTERS
from tests.adapters.adapter_tester import make_adapter


@pytest.fixture(scope="session")
def text_encoder(tiny_clip) -> str:
    return str(tiny_clip)


@pytest.fixture(params=list(ADAPTERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def adapter(name, text_encoder):
    return make_adapter(name, text_encoder)
