"""Both dtypes."""

import pytest
import torch


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    return request.param
