"""The page in a real browser: a prompt is typed, a picture appears, and nothing is fetched from elsewhere."""

from __future__ import annotations

import io
import re
import shutil
from urllib.parse import urlsplit

import pytest
from PIL import Image

from csdiff.app.config import AppConfig
from csdiff.app.server import serving
from csdiff.pipelines import GenerateConfig, generate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    # the server's event loop and the browser's connections are closed by garbage collection
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PATIENCE = 120_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def server():
    with serving(AppConfig(port=0, device="cpu", max_upload_mb=1)) as url:
        yield url


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
        page.goto(server)
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


def words_seen(page, selector: str) -> bool:
    """Whether the first words in an element are what is on the screen at their place."""
    return page.evaluate(
        """selector => {
            const words = document.querySelector(`${selector} p`), box = words.getBoundingClientRect();
            words.scrollIntoView({block: "center"});
            const now = words.getBoundingClientRect();
            return box.height > 10 && document.elementFromPoint(now.left + 5, now.top + now.height / 2) === words;
        }""",
        selector,
    )


def picture(page, selector: str, place: int = 0) -> Image.Image:
    """A picture that an element of the page shows, as the browser gets it."""
    source = page.wait_for_selector(f"{selector} img >> nth={place}").get_attribute("src")
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
    assert page.evaluate(top, "#images") < page.evaluate(top, "#draw")
    page.set_viewport_size({"width": 390, "height": 844})
    tops = [page.evaluate(top, place) for place in ("#draw", "#create-status", "#images", "#seed")]
    assert tops == sorted(tops)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_people_each_get_the_images_they_asked_for(new_page, tmp_path):
    people = [(new_page(), "a red apple", 3, 3), (new_page(), "a yellow duck", 4, 2)]
    people[0][0].check("#compare input")
    for page, *asked in people:
        draw(page, *asked)
    for page, *_ in people:
        assert wait_for(page, "#create-status", "Done") == "Done: 1 image."
    # Only now: models must not be loaded here while the page loads them in its threads.
    for page, prompt, seed, steps in people:
        assert f"seed {seed}" in page.inner_text("#images")
        command = page.input_value("#command textarea")
        for option in (f"--prompt '{prompt}'", f"--seed {seed}", "--decoder tiny", f"--steps {steps}"):
            assert option in command
        config = GenerateConfig(prompt=[prompt], seed=seed, steps=steps, device="cpu", progress=False)
        config.output = str(tmp_path / str(seed))
        (expected,) = generate(config)
        assert picture(page, "#images").tobytes() == Image.open(expected).convert("RGB").tobytes()
    strip = [picture(people[0][0], "#strip", place).tobytes() for place in range(3)]
    assert len(set(strip)) == 3
    assert strip[0] == picture(people[0][0], "#images").tobytes()
    assert not people[1][0].is_visible("#strip")


def test_a_blend_with_an_uploaded_image(new_page, tmp_path):
    page = new_page()
    page.get_by_role("tab", name="Blend").click()
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.set_input_files("#upload input[type=file]", tmp_path / "broken.png")
    wait_for(page, "#blend-status", "broken.png is no image that csdiff reads")
    for name in ("photo.png", "photo.webp", "photo.jpg"):
        Image.new("RGB", (90, 60), "blue").save(tmp_path / name)
        page.locator("#upload").get_by_label("Clear").click()
        page.wait_for_selector("#second")
        page.set_input_files("#upload input[type=file]", tmp_path / name)
        page.wait_for_selector("#uploaded img")
        page.wait_for_selector("#second", state="hidden")
    page.fill("#blend-steps input[type=number]", "2")
    page.click("#blend")
    wait_for(page, "#blend-status", "Done: 1 image.")
    assert picture(page, "#blended").size[0] >= 64


def test_enter_draws_and_shift_enter_makes_a_new_line(new_page):
    page = new_page()
    page.fill("#steps input[type=number]", "1")
    page.fill("#prompt textarea", "a red")
    page.press("#prompt textarea", "Shift+Enter")
    page.type("#prompt textarea", "apple")
    assert page.input_value("#prompt textarea") == "a red\napple"
    page.press("#prompt textarea", "Enter")
    assert "Done" in wait_for(page, "#create-status", "Done")


def test_history_reload_link_and_dropped_image(new_page, tmp_path):
    page = new_page()
    for prompt, seed in (("a red apple", 3), ("a yellow duck", 4)):
        draw(page, prompt, seed, 1)
        wait_for(page, "#images", prompt)
        wait_for(page, "#create-status", "Done")
    page.wait_for_function("document.querySelectorAll('#history img').length >= 2")
    # what was typed survives a reload
    page.wait_for_timeout(1500)
    page.reload()
    page.wait_for_function("document.querySelector('#prompt textarea')?.value == 'a yellow duck'")
    assert page.input_value("#seed input") == "4"
    # an image brings its settings back, by its file
    draw(page, "a purple flower", 9, 2)
    wait_for(page, "#create-status", "Done")
    source = page.wait_for_selector("#images img").get_attribute("src")
    (tmp_path / "flower.png").write_bytes(page.request.get(source).body())
    page.fill("#prompt textarea", "something else")
    page.get_by_text("Settings of an image").click()
    link = page.input_value("#link textarea, #link input")
    page.set_input_files("#dropped input[type=file]", tmp_path / "flower.png")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a purple flower'")
    # and in the history
    page.fill("#seed input", "1")
    page.click("#history img")
    page.click("#use-seed")
    page.wait_for_function("document.querySelector('#seed input').value == '9'")
    page.click("#to-blend")
    page.wait_for_selector("#uploaded img")
    # a link carries the settings to someone else
    other = new_page()
    other.goto(link)
    other.wait_for_function("document.querySelector('#prompt textarea')?.value == 'a purple flower'")
    assert other.input_value("#seed input") == "9"


def test_stop_and_an_empty_prompt(new_page):
    page = new_page()
    # As much as the page offers: the drawing must still go on when Stop is pressed.
    page.fill("#count input[type=number]", "8")
    draw(page, "a red apple", 0, 200)
    wait_for(page, "#create-status", "step")
    page.click("#stop")
    wait_for(page, "#create-status", "Stopped.")
    assert not page.query_selector_all("#images img")
    page.wait_for_timeout(500)
    draw(page, "   ", 0, 1)
    wait_for(page, "#create-status", "the prompt is empty")
    draw(page, "a red apple", -3, 1)
    wait_for(page, "#create-status", "found -3")
    page.wait_for_selector("#draw:enabled")


def test_stop_of_a_press_that_waits(new_page):
    first, second = new_page(), new_page()
    first.fill("#count input[type=number]", "8")
    draw(first, "a red apple", 0, 200)
    wait_for(first, "#create-status", "step")
    draw(second, "a yellow duck", 0, 200)
    wait_for(second, "#create-status", "1 before you")
    assert words_seen(second, "#create-status")
    assert second.is_disabled("#draw")
    second.click("#stop")
    wait_for(second, "#create-status", "Stopped.")
    # The other tabs tell it as well, while what is not theirs goes on.
    for tab, button in (("Blend", "#blend"), ("Look inside", "#look")):
        second.get_by_role("tab", name=tab).click()
        second.click(button)
        wait_for(second, f"{button}-status", "1 before you")
        assert words_seen(second, f"{button}-status")
        second.locator("button:visible", has_text="Stop").click()
        wait_for(second, f"{button}-status", "Stopped.")
    second.get_by_role("tab", name="Create").click()
    # The one who did not press goes on.
    before = first.inner_text("#create-status")
    first.wait_for_function("said => document.querySelector('#create-status').innerText != said", arg=before)
    assert "step" in first.inner_text("#create-status").lower()
    first.click("#stop")
    wait_for(first, "#create-status", "Stopped.")
    second.wait_for_timeout(2000)
    assert "Stopped." in second.inner_text("#create-status")
    assert not second.query_selector_all("#images img")


def test_a_store_can_be_looked_at(new_page, plain_store):
    page = new_page()
    page.get_by_role("tab", name="Look inside").click()
    page.fill("#path textarea, #path input", str(plain_store))
    page.click("#look")
    page.wait_for_selector("#plot-projection img")
    assert re.search(r"64 of 64 rows", page.inner_text("#inside"))
    assert "ridge" in page.inner_text("#metrics")


def test_browsers_are_forbidden_to_fetch_from_elsewhere(new_page):
    page = new_page()
    directive = page.evaluate(
        "() => new Promise(found => { document.addEventListener('securitypolicyviolation', "
        "event => found(event.violatedDirective)); new Image().src = 'http://192.0.2.1/x.png'; })"
    )
    assert directive == "img-src"
    new_page.requests[:] = [url for url in new_page.requests if "192.0.2.1" not in url]
