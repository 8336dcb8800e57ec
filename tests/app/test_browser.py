"""The page in a real browser: a prompt is typed, a picture appears, and nothing is fetched from elsewhere.

Answers come when they come: whatever follows an action is waited for, and no earlier state of the page may satisfy it.
"""

from __future__ import annotations

import io
import shutil
from urllib.parse import urlsplit

import pytest
from PIL import Image

from csdiff.app.config import AppConfig
from csdiff.app.server import serving
from csdiff.pipelines import GenerateConfig, generate
from csdiff.pipelines.generate import write_picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    # the server's event loop and the browser's connections are closed by garbage collection
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PATIENCE = 120_000  # milliseconds, on a busy machine
# Minutes of drawing, so that it still goes on when Stop is pressed.
MANY = 100
FORBIDDEN = "192.0.2.1"


@pytest.fixture(scope="module")
def server():
    with serving(AppConfig(port=0, device="cpu", max_upload_mb=1, max_images=MANY)) as url:
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

    yield make
    for context in contexts:
        context.close()
    assert not errors
    assert {urlsplit(url).hostname for url in requests} <= {None, "127.0.0.1", FORBIDDEN}


def draw(page, prompt: str, seed: int, steps: int, count: int = 1) -> None:
    page.fill("#prompt textarea", prompt)
    page.fill("#count input[type=number]", str(count))
    page.fill("#seed input", str(seed))
    page.fill("#steps input[type=number]", str(steps))
    # Playwright waits till it can be pressed.
    page.click("#draw")


def wait_for(page, selector: str, text: str) -> str:
    """Waits for words in an element; returns all that it says then."""
    said = page.wait_for_function(
        """([selector, text]) => {
            const said = document.querySelector(selector)?.innerText;
            return said?.includes(text) && said;
        }""",
        arg=[selector, text],
    )
    return said.json_value()


def wait_for_value(page, selector: str, value: str) -> None:
    wait = "([selector, value]) => document.querySelector(selector)?.value === value"
    page.wait_for_function(wait, arg=[selector, value])


def wait_for_words_on_the_screen(page, selector: str) -> None:
    """Waits till the first words in an element are what is on the screen at their place."""
    page.wait_for_function(
        """selector => {
            const words = document.querySelector(`${selector} p`);
            words?.scrollIntoView({block: "center"});
            const box = words?.getBoundingClientRect();
            return box?.height > 10 && document.elementFromPoint(box.left + 5, box.top + box.height / 2) === words;
        }""",
        arg=selector,
    )


def picture(page, selector: str, caption: str, place: int = 0) -> bytes:
    """The file of a picture that is finished, which its caption tells, as the browser gets it."""
    wait_for(page, selector, caption)
    source = page.wait_for_selector(f"{selector} img >> nth={place}").get_attribute("src")
    return page.request.get(source).body()


def pixels(file) -> bytes:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file).convert("RGB").tobytes()


def test_pictures_follow_the_button_on_a_phone_and_tabs_keep_their_place(new_page):
    page = new_page()
    left = "document.querySelector('#head').getBoundingClientRect().left"
    at_first = page.evaluate(left)
    for tab, button in (("Blend", "#blend"), ("Look inside", "#look"), ("Create", "#draw")):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_selector(button)
        assert page.evaluate(left) == at_first
    in_order = """(...places) => {
        const tops = places.flat().map(place => document.querySelector(place).getBoundingClientRect().top);
        return tops.every((top, place) => place === 0 || tops[place - 1] <= top);
    }"""
    page.wait_for_function(in_order, arg=["#images", "#draw"])
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function(in_order, arg=["#draw", "#draw-status", "#images", "#seed"])
    page.wait_for_function("document.documentElement.scrollWidth <= 390")


def test_two_people_each_get_the_images_they_asked_for(new_page, tmp_path):
    people = [(new_page(), "a red apple", 3, 3), (new_page(), "a yellow duck", 4, 2)]
    first, second = (page for page, *_ in people)
    first.check("#compare input")
    for page, *asked in people:
        draw(page, *asked)
    for page, *_ in people:
        assert wait_for(page, "#draw-status", "Done") == "Done: 1 image."
    # Only now: models must not be loaded here while the page loads them in its threads.
    for page, prompt, seed, steps in people:
        command = page.input_value("#command textarea")
        for option in (f"--prompt '{prompt}'", f"--seed {seed}", "--decoder tiny", f"--steps {steps}"):
            assert option in command
        config = GenerateConfig(prompt=[prompt], seed=seed, steps=steps, device="cpu", progress=False)
        config.output = str(tmp_path / str(seed))
        (expected,) = generate(config)
        assert pixels(picture(page, "#images", f"seed {seed}")) == pixels(expected)
    strip = [pixels(picture(first, "#strip", "Ridge", place)) for place in range(3)]
    assert len(set(strip)) == 3
    assert strip[0] == pixels(picture(first, "#images", "seed 3"))
    assert not second.is_visible("#strip")


def test_a_blend_with_an_uploaded_image(new_page, tmp_path):
    page = new_page()
    page.get_by_role("tab", name="Blend").click()
    (tmp_path / "broken.png").write_bytes(b"no image")
    page.set_input_files("#upload input[type=file]", tmp_path / "broken.png")
    wait_for(page, "#blend-status", "broken.png is damaged, or no image that csdiff reads")
    for name in ("photo.png", "photo.webp", "photo.jpg"):
        Image.new("RGB", (90, 60), "blue").save(tmp_path / name)
        page.locator("#upload").get_by_label("Clear").click()
        # what was said of the one before goes, and so does its picture
        page.wait_for_selector("#blend-status .error", state="detached")
        page.wait_for_selector("#uploaded", state="hidden")
        page.set_input_files("#upload input[type=file]", tmp_path / name)
        page.wait_for_selector("#uploaded img")
        page.wait_for_selector("#second", state="hidden")
    page.fill("#blend-steps input[type=number]", "2")
    page.click("#blend")
    wait_for(page, "#blend-status", "Done: 1 image.")
    assert Image.open(io.BytesIO(picture(page, "#blended", "50 : 50"))).size[0] >= 64


def test_files_that_are_refused(new_page, tmp_path):
    page = new_page()
    page.get_by_text("Settings of an image").click()
    for name, size in (("no.png", 9), ("notes.txt", 9), ("big.png", 2**20 + 1)):
        (tmp_path / name).write_bytes(b"x" * size)
    page.set_input_files("#dropped input[type=file]", tmp_path / "no.png")
    wait_for(page, "#draw-status", "found no settings in no.png")
    page.locator("#dropped").get_by_label("Clear").click()
    page.wait_for_selector("#draw-status .error", state="detached")
    path = write_picture(tmp_path, "long", Image.new("RGB", (8, 8)), {"prompt": "a cat", "steps": 900})
    page.set_input_files("#dropped input[type=file]", path)
    wait_for(page, "#draw-status", "Steps 900: more than this page takes")
    wait_for_value(page, "#steps input[type=number]", "200")
    page.locator("#dropped").get_by_label("Clear").click()
    page.wait_for_selector("#draw-status .note", state="detached")
    page.set_input_files("#dropped input[type=file]", tmp_path / "notes.txt")
    wait_for(page, ".toast-wrap", "notes.txt. Only .png allowed")
    page.set_input_files("#dropped input[type=file]", tmp_path / "big.png")
    wait_for(page, ".toast-wrap", 'size of 1.0 Mb: "big.png"')


def test_enter_draws_and_shift_enter_makes_a_new_line(new_page):
    page = new_page()
    page.fill("#steps input[type=number]", "1")
    page.fill("#prompt textarea", "a red")
    page.press("#prompt textarea", "Shift+Enter")
    page.type("#prompt textarea", "apple")
    wait_for_value(page, "#prompt textarea", "a red\napple")
    page.press("#prompt textarea", "Enter")
    wait_for(page, "#draw-status", "Done")


def test_history_reload_link_and_dropped_image(new_page, tmp_path):
    page = new_page()
    for prompt, seed in (("a red apple", 3), ("a yellow duck", 4)):
        draw(page, prompt, seed, 1)
        wait_for(page, "#images", f"seed {seed} · {prompt}")
        wait_for(page, "#draw-status", "Done")
    page.wait_for_function("document.querySelectorAll('#history img').length >= 2")
    # what was typed survives a reload
    before = page.evaluate("localStorage['csdiff-settings']")
    page.fill("#prompt textarea", "a green duck")
    page.wait_for_function("before => localStorage['csdiff-settings'] !== before", arg=before)
    page.reload()
    wait_for_value(page, "#prompt textarea", "a green duck")
    wait_for_value(page, "#seed input", "4")
    # an image brings its settings back, by its file
    draw(page, "a purple flower", 9, 2)
    wait_for(page, "#draw-status", "Done")
    (tmp_path / "flower.png").write_bytes(picture(page, "#images", "seed 9"))
    page.fill("#prompt textarea", "something else")
    page.get_by_text("Settings of an image").click()
    link = page.wait_for_function("document.querySelector('#link textarea, #link input')?.value").json_value()
    page.set_input_files("#dropped input[type=file]", tmp_path / "flower.png")
    wait_for_value(page, "#prompt textarea", "a purple flower")
    # and in the history
    page.fill("#seed input", "1")
    page.click("#history img")
    page.click("#use-seed")
    wait_for_value(page, "#seed input", "9")
    page.click("#to-blend")
    page.wait_for_selector("#uploaded img")
    # a link carries the settings to someone else
    other = new_page()
    other.goto(link)
    wait_for_value(other, "#prompt textarea", "a purple flower")
    wait_for_value(other, "#seed input", "9")


def test_stop_and_an_empty_prompt(new_page):
    page = new_page()
    page.check("#compare input")
    draw(page, "a red apple", 0, 200, MANY)
    wait_for(page, "#images", "still being drawn")
    page.click("#stop-draw")
    wait_for(page, "#draw-status", "Stopped.")
    wait_for(page, "#images", "stopped")
    page.wait_for_selector("#strip", state="hidden")
    draw(page, "   ", 0, 1)
    wait_for(page, "#draw-status", "the prompt is empty")
    draw(page, "a red apple", -3, 1)
    assert "“Seed”: expected" in wait_for(page, "#draw-status", "found -3")
    page.wait_for_selector("#draw:enabled")


def test_stop_of_a_press_that_waits(new_page):
    first, second = new_page(), new_page()
    second.fill("#prompt textarea", "a yellow duck")
    draw(first, "a red apple", 0, 200, MANY)
    wait_for(first, "#draw-status", "step")
    # The other tabs tell it as well, while what is not theirs goes on.
    for tab, button in (("Create", "#draw"), ("Blend", "#blend"), ("Look inside", "#look")):
        second.get_by_role("tab", name=tab).click()
        second.click(button)
        wait_for(second, f"{button}-status", "1 before you")
        wait_for_words_on_the_screen(second, f"{button}-status")
        second.wait_for_selector(f"{button}:disabled")
        second.click(f"#stop-{button[1:]}")
        wait_for(second, f"{button}-status", "Stopped.")
    # The one who did not press goes on.
    before = first.inner_text("#draw-status")
    first.wait_for_function("said => document.querySelector('#draw-status').innerText !== said", arg=before)
    wait_for(first, "#draw-status", "tep ")
    first.click("#stop-draw")
    wait_for(first, "#draw-status", "Stopped.")
    # Nothing may come late.
    second.wait_for_timeout(2000)
    second.get_by_role("tab", name="Create").click()
    wait_for(second, "#draw-status", "Stopped.")
    assert not second.query_selector_all("#images img")


def test_adapters_trained_meanwhile_are_listed_at_the_next_load(new_page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = new_page()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "csdiff.json").write_text("{}")
    page.reload()
    page.get_by_text("Models", exact=True).click()
    page.click("#adapter input")
    page.get_by_role("option", name="runs/mine").wait_for()


def test_a_store_can_be_looked_at(new_page, plain_store):
    page = new_page()
    page.get_by_role("tab", name="Look inside").click()
    page.fill("#path textarea, #path input", str(plain_store))
    page.click("#look")
    page.wait_for_selector("#plot-projection img")
    wait_for(page, "#inside", "64 of 64 rows")
    wait_for(page, "#metrics", "ridge")
    page.wait_for_selector("#inside >> text=What is in the folder")
    page.wait_for_selector("#inside >> text=Model card", state="hidden")


def test_browsers_are_forbidden_to_fetch_from_elsewhere(new_page):
    page = new_page()
    directive = page.evaluate(
        "host => new Promise(found => { document.addEventListener('securitypolicyviolation', "
        "event => found(event.violatedDirective)); new Image().src = `http://${host}/x.png`; })",
        FORBIDDEN,
    )
    assert directive == "img-src"
