"""Who reaches the page: with a password, and by which names without one."""

import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar

import pytest

from csdiff.app.config import AppConfig
from csdiff.app.server import start


@pytest.fixture(scope="module")
def url():
    served = start(AppConfig(port=0, device="cpu", password="secret"))
    yield served.url.rstrip("/")
    served.close()


def status(opener, url: str, data: dict | None = None) -> int:
    body = None if data is None else urllib.parse.urlencode(data).encode()
    try:
        return opener.open(url, body, timeout=120).status
    except urllib.error.HTTPError as error:
        return error.code


def test_wrong_and_right_password(url):
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    assert status(opener, f"{url}/config") == 401
    assert status(opener, f"{url}/login", {"username": "a", "password": "Secret"}) == 400
    assert status(opener, f"{url}/config") == 401
    assert status(opener, f"{url}/login", {"username": "a", "password": "secret"}) == 200
    assert status(opener, f"{url}/config") == 200


@pytest.fixture(scope="module")
def open_url():
    served = start(AppConfig(port=0, device="cpu", allow_host=["proxy.example"]))
    yield served.url.rstrip("/")
    served.close()


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
def test_pages_from_elsewhere_do_not_reach_a_page_without_password(open_url, headers, code):
    assert status(urllib.request.build_opener(), urllib.request.Request(f"{open_url}/config", headers=headers)) == code


def test_with_a_password_any_name_does(url):
    request = urllib.request.Request(f"{url}/config", headers={"Host": "any.example"})
    assert status(urllib.request.build_opener(), request) == 401
