"""Who may reach the page, and what is refused before anything is served."""

import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from csdiff.app.config import AppConfig
from csdiff.app.server import PASSWORD, check_access, is_loopback, local_only, right_password, serving
from csdiff.errors import CSDiffError


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("10.0.0.7", False)],
)
def test_only_loopback_needs_no_password(host, alone):
    assert is_loopback(host) is alone
    check_access(AppConfig(host=host), "secret")
    if alone:
        check_access(AppConfig(host=host), None)
    else:
        with pytest.raises(CSDiffError, match=f"{host} can be reached by others.*--password"):
            check_access(AppConfig(host=host), None)


@pytest.mark.parametrize(
    "options",
    [{"port": 70000}, {"max_images": 0}, {"max_upload_mb": 0}, {"password": ""}, {"host": "0.0.0.0"}, {"dtype": "x"}],
)
def test_bad_options(options, monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(CSDiffError, match=next(iter(options))), serving(AppConfig(**options)):
        pass


def test_bad_models_and_a_taken_port_are_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, words in (({"port": port}, f"port {port}"), ({"adapter": "/nowhere"}, "/nowhere")):
            with pytest.raises(CSDiffError, match=words), serving(AppConfig(device="cpu", **options)):
                pass


def test_missing_gradio_is_one_sentence(monkeypatch):
    # None in sys.modules is how Python itself marks a module that cannot be imported
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(CSDiffError, match=r'pip install "csdiff\[app\]"'), serving(AppConfig(port=0)):
        pass


def test_with_a_password_only_that_one_does_and_any_name_of_the_page():
    def code(url: str, data: dict | None = None, **headers) -> int:
        body = None if data is None else urllib.parse.urlencode(data).encode()
        try:
            return opener.open(urllib.request.Request(url, body, headers), timeout=120).status
        except urllib.error.HTTPError as error:
            return error.code

    assert right_password("pâss", "pâss")
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    with serving(AppConfig(port=0, device="cpu", password="secret")) as url:
        assert code(f"{url}config", Host="any.example") == 401
        assert code(f"{url}login", {"username": "a", "password": "Secret"}) == 400
        assert code(f"{url}config") == 401
        assert code(f"{url}login", {"username": "a", "password": "secret"}) == 200
        assert code(f"{url}config") == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({"Host": "localhost:7860"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "proxy.example"}, 200),
        ({"Host": "evil.example:7860"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://proxy.example"}, 200),
    ],
)
def test_pages_from_elsewhere_do_not_reach_a_page_without_password(headers, code):
    for hosts, expected in ((frozenset({"proxy.example"}), code), (None, 200)):
        client = TestClient(local_only(PlainTextResponse("page"), hosts), base_url="http://127.0.0.1")
        answer = client.get("/config", headers=headers)
        assert answer.status_code == expected
        assert "default-src 'self'" in answer.headers["content-security-policy"]
