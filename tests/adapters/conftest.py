"""Fixtures of the adapter tests."""

import pytest
import torch

from tests.adapters.adapter_tester import CASES, make_adapter, save_text_encoder


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory) -> str:
    return save_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(params=list(CASES))
def name(request) -> str:
    return request.param


@pytest.fixture
def adapter(name, text_encoder):
    torch.manual_seed(0)
    return make_adapter(name, text_encoder)
