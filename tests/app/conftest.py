import pytest

from csdiff.app.config import AppConfig
from csdiff.app.models import Models


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Models:
    """The shipped models."""
    return Models(AppConfig(device="cpu"), tmp_path_factory.mktemp("pictures"))
