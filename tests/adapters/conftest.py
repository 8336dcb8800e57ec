"""Fixtures of the adapter tests."""

import pytest
import torch

from tests.adapters.adapter_tester import CASES, make_adapter


@pytest.fixture(scope="session")
def text_encoder(tiny_clip) -> str:
    return str(tiny_clip)


@pytest.fixture(params=list(CASES))
def name(request) -> str:
    return request.param


@pytest.fixture
def adapter(name, text_encoder):
    torch.manual_seed(0)
    return make_adapter(name, text_encoder)
