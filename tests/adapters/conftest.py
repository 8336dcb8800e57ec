"""Fixtures of the adapter tests."""

import pytest
import torch

from csdiff.adapters import ADAPTERS
from tests.adapters.adapter_tester import make_adapter


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_encoder(tiny_clip) -> str:
    return str(tiny_clip)


@pytest.fixture(params=list(ADAPTERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def adapter(name, text_encoder):
    return make_adapter(name, text_encoder)
