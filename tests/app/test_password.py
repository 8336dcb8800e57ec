"""A page with a password shows nothing without it."""

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
