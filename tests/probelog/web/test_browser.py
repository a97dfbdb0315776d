"""The page in a real browser, headless Chromium: what a visitor does, at two sizes, light and dark, with and without script.

Pictures of all pages are kept as artefacts, in the folder that ``PROBELOG_SCREENSHOTS`` names or in the test's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.probelog.encoders.test_decoding import encoded
from tests.support.worlds.tiny_encoders import photo

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("web")]

SIZES = {"desktop": (1280, 900), "phone": (360, 740)}
PAGES = {
    "front": "/",
    "search": "/search?q=dog&k=5",
    "filtered": "/search?q=dog,+puppy&not=cat&licence=mit&by=model&k=5",
    "model": "/models/tree/child",
    "hostile": "/models/mallory/html",
    "tree": "/tree/tree/child",
    "index": "/index",
    "front of generators": "/?kind=generator",
    "generators": "/search?kind=generator&q=cat",
    "generator": "/generators/kim/lora-umbrella",
    "error": "/models/no/body",
}
_MOST_SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here: the page was not tested in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("PROBELOG_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


Open = Callable[..., "Page"]


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Open]:
    """Opens a page in a browser that is as good as new. What its console says, and what it asks of others, is an error."""
    contexts, faults = [], []

    def visit(path: str, size: str = "desktop", scheme: str = "light", **options: Any) -> Page:
        width, height = SIZES[size]
        context = browser.new_context(
            base_url=address, viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda line: "status of 4" in line.text or faults.append(line.text))
        page.on("request", lambda asked: asked.url.startswith((address, "data:")) or faults.append(asked.url))
        page.goto(path)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert faults == []


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_accessible_and_fits(visit: Open, artefacts: Path, name: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for size, scheme in (("desktop", "light"), ("phone", "dark")):
        page = visit(PAGES[name], size, scheme)
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert beyond == 0, f"{name} is {beyond} pixels too wide for a {size}"
        page.screenshot(path=artefacts / f"{name}-{size}-{scheme}.png", full_page=True)
        # Its checker is our script and not the page's: a policy that keeps others' out stays in force.
        found = Axe().run(page).response["violations"]
        assert [
            (item["id"], item["nodes"][0]["html"]) for item in found if item["impact"] in _MOST_SERIOUS
        ] == []


@pytest.mark.parametrize("script", [True, False])
def test_from_a_word_to_the_code(visit: Open, script: bool) -> None:
    """By keyboard alone, with and without JavaScript: search, narrow down, look at a model, go on from a logit."""
    page = visit("/", java_script_enabled=script)
    page.get_by_role("searchbox").fill("dog, puppy")
    page.get_by_label("but not").fill("cat")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?**")
    assert "q=dog%2C+puppy&not=cat" in page.url
    assert page.get_by_role("searchbox").input_value() == "dog, puppy"
    page.get_by_role("link", name="mit").first.click()
    page.wait_for_url("**licence=mit**")
    assert "not=cat" in page.url
    repo = page.locator(".hit h3 a").first.inner_text()
    page.locator(".hit h3 a").first.click()
    page.wait_for_url("**/models/**")
    assert page.get_by_role("heading", level=1).inner_text() == repo
    page.get_by_role("link", name="more like this").first.click()
    page.wait_for_url("**/search?like=**")
    assert page.locator(".hit").count() > 0
    assert "Like" in page.locator(".chip").inner_text()


def test_pictures_are_chosen_dropped_and_pasted(visit: Open, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.png")
        files[-1].write_bytes(encoded(photo(2000, 40 + seed, seed), "PNG"))
    page = visit("/")
    page.locator("input[type=file]").set_input_files(files[0])
    page.wait_for_url("**/search?picture=**")
    assert page.locator(".chip img").evaluate("image => image.complete && image.naturalWidth") == 96
    first = page.url
    # A picture more, dropped anywhere, and then one from the clipboard.
    for kind in ("drop", "paste"):
        page.evaluate(
            """async ([kind, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
                const event = kind === "drop"
                    ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true })
                    : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
                document.body.dispatchEvent(event);
            }""",
            [kind, [*encoded(photo(30, 30, 3 if kind == "drop" else 4), "PNG")]],
        )
        page.wait_for_url(
            lambda url, expected={"drop": 2, "paste": 3}[kind]: url.count("picture=") == expected
        )
    assert page.locator(".chip").count() == 3
    page.get_by_label("Without picture 2").click()
    page.wait_for_url(lambda url: url.count("picture=") == 2)
    # The address works for somebody else, who has no small picture of it.
    other = visit(first)
    assert other.locator(".hit").count() > 0
    assert other.locator(".chip img").count() == 0


def test_a_sketch_is_drawn_taken_back_and_searched_with(visit: Open) -> None:
    page = visit("/", has_touch=True)
    page.get_by_text("Generators", exact=True).click()
    page.wait_for_url("**/?kind=generator")
    assert page.get_by_role("radio", name="Generators").is_checked()
    page.get_by_text("Sketch it").click()
    canvas, search = page.locator("canvas"), page.get_by_role("button", name="Search with this sketch")
    empty = canvas.evaluate("canvas => canvas.toDataURL()")
    assert search.is_disabled()
    place = canvas.bounding_box()
    assert place is not None
    strokes = []
    for width in (40, 200):
        page.mouse.move(place["x"] + 20, place["y"] + 20)
        page.mouse.down()
        page.mouse.move(place["x"] + width, place["y"] + 150, steps=4)
        page.mouse.up()
        strokes.append(canvas.evaluate("canvas => canvas.toDataURL()"))
    assert len({empty, *strokes}) == 3
    page.get_by_role("button", name="Undo").click()
    assert canvas.evaluate("canvas => canvas.toDataURL()") == strokes[0]
    page.get_by_role("button", name="Clear").click()
    assert canvas.evaluate("canvas => canvas.toDataURL()") == empty
    assert search.is_disabled()
    page.touchscreen.tap(place["x"] + 90, place["y"] + 90)
    search.click()
    page.wait_for_url("**/search?kind=generator&sketch=**")
    assert page.locator(".chip img").evaluate("image => image.complete && image.naturalWidth") == 96
    assert page.locator(".hit .gallery img").count() > 0


def test_a_sketch_is_chosen_by_keyboard_and_without_a_script(visit: Open, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photo(64, 64, 1), "PNG"))
    page = visit("/?kind=generator")
    page.get_by_text("Sketch it").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Choose a sketch").set_input_files(tmp_path / "a.png")
    page.wait_for_url("**/search?kind=generator&sketch=**")
    chosen = page.url
    page = visit("/?kind=generator", java_script_enabled=False)
    assert page.locator("canvas").count() == 0 or not page.locator("canvas").is_visible()
    page.get_by_label("Sketch", exact=True).set_input_files(tmp_path / "a.png")
    page.get_by_role("button", name="Search with files").click()
    page.wait_for_url("**/search?kind=generator&sketch=**")
    assert page.url == chosen
    page.get_by_role("radio", name="Classifiers").check()
    page.get_by_role("searchbox").fill("dog")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?kind=classifier&q=dog**")
    assert page.locator(".hit").count() > 0


def test_what_is_no_picture_is_said(visit: Open, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    page = visit("/")
    page.locator("input[type=file]").set_input_files(tmp_path / "a.png")
    status = page.get_by_role("status")
    status.filter(has_text="damaged image").or_(status.filter(has_text="not an image")).wait_for()
    page.get_by_role("searchbox").fill("dog")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?q=dog")


def test_a_tree_is_folded_and_filters_are_there_on_a_phone(visit: Open) -> None:
    page = visit("/tree/tree/child", "phone")
    grandchild = page.get_by_role("link", name="tree/grandchild")
    assert grandchild.is_visible()
    page.get_by_label("Made from tree/child").click()
    assert not grandchild.is_visible()
    page = visit("/search?q=dog", "phone")
    licence = page.get_by_role("link", name="apache-2.0")
    assert not licence.is_visible()
    page.locator("summary", has_text="Filters").click()
    licence.click()
    page.wait_for_url("**licence=apache-2.0**")
    assert visit("/search?q=dog").get_by_role("link", name="apache-2.0").is_visible()
