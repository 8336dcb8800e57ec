"""The page in a real browser: a prompt is typed, a picture appears, and nothing is fetched from elsewhere."""

from __future__ import annotations

import io
import re
import shutil
from urllib.parse import urlsplit

import pytest
from PIL import Image

from csdiff.app.config import AppConfig
from csdiff.app.server import start
from csdiff.pipelines import GenerateConfig, generate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    # the server's event loop and the browser's connections are closed by garbage collection
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PATIENCE = 300_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def server():
    served = start(AppConfig(port=0, device="cpu", max_upload_mb=1))
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # root in a container has no sandbox to give
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def new_page(server, browser):
    """Makes a person: a page with cookies and a session of its own."""
    contexts, requests, errors = [], [], []

    def make():
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#prompt textarea")
        return page

    make.requests = requests
    yield make
    for context in contexts:
        context.close()
    assert not errors
    outside = [url for url in requests if urlsplit(url).hostname not in (None, "127.0.0.1")]
    assert not outside


def draw(page, prompt: str, seed: int, steps: int) -> None:
    page.fill("#prompt textarea", prompt)
    page.fill("#seed input", str(seed))
    page.fill("#steps input[type=number]", str(steps))
    page.click("#draw")


def wait_for(page, selector: str, text: str) -> str:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector).innerText.includes(text)", arg=[selector, text]
    )
    return page.inner_text(selector)


def picture(page, selector: str) -> Image.Image:
    """The picture that an element of the page shows, as the browser gets it."""
    source = page.wait_for_selector(f"{selector} img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def test_pictures_follow_the_button_on_a_phone_and_tabs_keep_their_place(new_page):
    page = new_page()
    top = "selector => document.querySelector(selector).getBoundingClientRect().top"
    left = "document.querySelector('#head').getBoundingClientRect().left"
    at_first = page.evaluate(left)
    for tab in ("Blend", "Look inside", "Create"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_selector({"Blend": "#blend", "Look inside": "#look", "Create": "#draw"}[tab])
        assert page.evaluate(left) == at_first
    assert page.evaluate(top, "#pictures") < page.evaluate(top, "#draw")
    page.set_viewport_size({"width": 390, "height": 844})
    tops = [page.evaluate(top, place) for place in ("#draw", "#create-status", "#pictures", "#strip", "#seed")]
    assert tops == sorted(tops)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_people_each_get_the_pictures_they_asked_for(new_page, tmp_path):
    people = [(new_page(), "a red apple", 3, 3), (new_page(), "a yellow duck", 4, 2)]
    for page, *asked in people:
        draw(page, *asked)
    for page, *_ in people:
        assert wait_for(page, "#create-status", "Done") == "Done: 1 picture."
    # Only now: models must not be loaded here while the page loads them in its threads.
    for page, prompt, seed, steps in people:
        assert f"seed {seed}" in page.inner_text("#pictures")
        command = page.input_value("#command textarea")
        assert f"--prompt '{prompt}' --seed {seed} --decoder tiny --steps {steps}" in command
        config = GenerateConfig(prompt=[prompt], seed=seed, steps=steps, device="cpu", progress=False)
        config.output = str(tmp_path / str(seed))
        (expected,) = generate(config)
        assert picture(page, "#pictures").tobytes() == Image.open(expected).convert("RGB").tobytes()
        strip = {place: picture(page, f"#strip-{place}").tobytes() for place in ("raw", "ridge", "adapter")}
        assert len(set(strip.values())) == 3


def test_stop_and_an_empty_prompt(new_page):
    page = new_page()
    # As much as the page offers: the drawing must still go on when Stop is pressed.
    page.fill("#count input[type=number]", "8")
    draw(page, "a red apple", 0, 200)
    wait_for(page, "#create-status", "step")
    page.click("#stop")
    wait_for(page, "#create-status", "Stopped.")
    assert not page.query_selector_all("#pictures img")
    # A press just before the page has heard that the drawing ended counts as a repeated one.
    for _ in range(10):
        draw(page, "   ", 0, 1)
        page.wait_for_timeout(1000)
        if "is empty" in page.inner_text("#create-status"):
            break
    assert "is empty" in page.inner_text("#create-status")


def test_stop_of_a_press_that_waits(new_page):
    first, second = new_page(), new_page()
    first.fill("#count input[type=number]", "8")
    draw(first, "a red apple", 0, 200)
    wait_for(first, "#create-status", "step")
    draw(second, "a yellow duck", 0, 200)
    second.click("#stop")
    wait_for(second, "#create-status", "Stopped.")
    # The one who did not press goes on.
    before = first.inner_text("#create-status")
    first.wait_for_function("said => document.querySelector('#create-status').innerText != said", arg=before)
    assert "step" in first.inner_text("#create-status").lower()
    first.click("#stop")
    wait_for(first, "#create-status", "Stopped.")
    second.wait_for_timeout(2000)
    assert "Stopped." in second.inner_text("#create-status")
    assert not second.query_selector_all("#pictures img")


def test_bad_upload_is_a_sentence_and_a_store_can_be_looked_at(new_page, tmp_path, plain_store):
    page = new_page()
    page.get_by_role("tab", name="Blend").click()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#second-picture input[type=file]", tmp_path / "broken.png")
    wait_for(page, "#blend-status", "broken.png cannot be read as a picture")
    page.get_by_role("tab", name="Look inside").click()
    page.fill("#path textarea, #path input", str(plain_store))
    page.click("#look")
    page.wait_for_selector("#plot-projection img")
    assert re.search(r"64 of 64 rows", page.inner_text("#inside"))


def test_browsers_are_forbidden_to_fetch_from_elsewhere(new_page):
    page = new_page()
    directive = page.evaluate(
        "() => new Promise(found => { document.addEventListener('securitypolicyviolation', "
        "event => found(event.violatedDirective)); new Image().src = 'http://192.0.2.1/x.png'; })"
    )
    assert directive == "img-src"
    new_page.requests[:] = [url for url in new_page.requests if "192.0.2.1" not in url]
