"""Takes the pictures of docs/app.md: `python scripts/app_screenshots.py` (needs a Chromium, takes minutes).

Serves the page with the shipped models and drives it as a person would, so that the pictures show what the models of
the day draw: `docs/figures/app_create.png`, `app_dark.png`, `app_narrow.png`, `app_blend.png` and `app_inside.png`.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from csdiff.app.config import AppConfig
from csdiff.app.server import serving

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 600_000  # milliseconds
DESKTOP, NARROW = {"width": 1200, "height": 800}, {"width": 390, "height": 844}


def wait_for(page: Page, selector: str, text: str) -> None:
    page.wait_for_function("([at, text]) => document.querySelector(at).innerText.includes(text)", arg=[selector, text])
    page.wait_for_timeout(1500)


def shoot(page: Page, name: str, whole: bool = True) -> None:
    """Writes the page, or what is on the screen, in 256 colours: a third of the bytes."""
    shot = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    shot.quantize(256, dither=Image.Dither.NONE).save(FIGURES / f"app_{name}.png", optimize=True)
    print(FIGURES / f"app_{name}.png", flush=True)


def create(page: Page, prompt: str, count: int) -> None:
    page.fill("#prompt textarea", prompt)
    page.check("#compare input")
    page.fill("#count input[type=number]", str(count))
    page.click("#draw")
    wait_for(page, "#draw-status", "Done")


def blend(page: Page) -> None:
    page.get_by_role("tab", name="Blend").click()
    page.get_by_label("The whole way").check()
    page.click("#blend")
    wait_for(page, "#blend-status", "Done")


def look_inside(page: Page) -> None:
    page.get_by_role("tab", name="Look inside").click()
    page.click("#look")
    page.wait_for_selector("#plot-gap img")
    page.wait_for_timeout(3000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a laughing face with tears, noto style")
    parser.add_argument("--pictures", type=int, default=4)
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        parser.error(f"expected a browser ({', '.join(BROWSERS)}), found none")
    with serving(AppConfig(port=0)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=DESKTOP)
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        create(page, options.prompt, options.pictures)
        shoot(page, "create")
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(1500)
        shoot(page, "dark", whole=False)
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(NARROW)
        page.wait_for_timeout(1500)
        shoot(page, "narrow")
        page.set_viewport_size(DESKTOP)
        blend(page)
        shoot(page, "blend")
        look_inside(page)
        shoot(page, "inside")
        browser.close()


if __name__ == "__main__":
    main()
