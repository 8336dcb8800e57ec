"""Who may reach the page, and what is refused before anything is loaded."""

import json
import os
import shutil
import socket
import sys

import pytest

from csdiff.app.config import AppConfig
from csdiff.app.server import PASSWORD, check_access, free_port, is_loopback, right_password, start
from csdiff.errors import CSDiffError
from csdiff.resources import assets_dir


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("10.0.0.7", False)],
)
def test_only_loopback_needs_no_password(host, alone):
    assert is_loopback(host) is alone
    if alone:
        check_access(AppConfig(host=host), None)
    else:
        with pytest.raises(CSDiffError, match="--password"):
            check_access(AppConfig(host=host), None)
        check_access(AppConfig(host=host), "secret")


def test_other_address_is_refused_before_anything_is_served(monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(CSDiffError, match="can be reached by others"):
        start(AppConfig(host="0.0.0.0", port=0))


def test_password_is_compared_whole():
    assert right_password("pâss", "pâss")
    assert not right_password("pâs", "pâss")


@pytest.mark.parametrize("options", [{"port": 70000}, {"max_images": 0}, {"max_upload_mb": 0}, {"password": ""}])
def test_bad_options(options):
    with pytest.raises(CSDiffError, match=next(iter(options))):
        start(AppConfig(**options))


def test_taken_port_is_named_and_zero_takes_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CSDiffError, match=str(taken.getsockname()[1])):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0


def test_missing_gradio_is_one_sentence(monkeypatch):
    # None in sys.modules is how Python itself marks a module that cannot be imported
    monkeypatch.setitem(sys.modules, "gradio", None)
    before = dict(os.environ)
    with pytest.raises(CSDiffError, match=r'pip install "csdiff\[app\]"'):
        start(AppConfig(port=0))
    assert dict(os.environ) == before


@pytest.mark.parametrize(("steps", "guidance", "shown"), [(150, 20.0, (150, 20.0)), (900, 90.0, (200, 30.0))])
def test_sliders_take_what_any_decoder_is_made_for(models, tmp_path, steps, guidance, shown):
    """Gradio refuses a press of the button with a number beyond a slider's bounds."""
    gr = pytest.importorskip("gradio")
    from csdiff.app.page import Fields, sampling_of

    decoder = shutil.copytree(assets_dir() / "decoder", tmp_path / "decoder")
    fingerprint = json.loads((decoder / "csdiff.json").read_text())
    fingerprint["sampling"] = {"steps": steps, "guidance": guidance}
    (decoder / "csdiff.json").write_text(json.dumps(fingerprint))
    with gr.Blocks():
        fields = Fields(models)
    numbers = sampling_of(models, str(decoder))
    assert numbers == shown
    assert (fields.steps.preprocess(numbers[0]), fields.guidance.preprocess(numbers[1])) == shown
