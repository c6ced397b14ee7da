"""The page in a real browser; skipped where there is none."""

import os
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = {"phone": {"width": 360, "height": 740}, "desk": {"width": 1100, "height": 800}}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_images_are_classified_on_the_page(browser, address, png, direct, size, scheme):
    page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)
    told, foreign = [], []
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: foreign.append(request.url) if address not in request.url else None)
    page.goto(f"http://{address}/")
    sync_api.expect(page.locator("#about")).to_contain_text("4 tasks")
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": png(n)} for n in range(3)]
    page.set_input_files("#files", [*files, {"name": "b.png", "mimeType": "image/png", "buffer": b"no"}])
    sync_api.expect(page.locator("article .label")).to_have_count(3)
    sync_api.expect(page.locator("article .bad")).to_contain_text("not an image")
    labels = {element.inner_text() for element in page.locator("article .label span").all()}
    assert labels == {found["label"] for found in direct([png(n) for n in range(3)])}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert [text for text in told if "422" not in text] == []
    assert [url for url in foreign if not url.startswith(("blob:", "data:"))] == []
    if folder := os.environ.get("MASS_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{size}-{scheme}.png")
    page.close()


def test_a_pasted_image_and_a_given_task_work(browser, address, png):
    page = browser.new_page()
    page.goto(f"http://{address}/")
    sync_api.expect(page.locator("#about")).to_contain_text("4 tasks")
    page.select_option("#task", "birds")
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "p.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }""",
        list(png()),
    )
    sync_api.expect(page.locator("article .task")).to_have_text("birds")
    sync_api.expect(page.locator("article .route")).to_have_text("The task was given.")
    page.click("#clear")
    sync_api.expect(page.locator("article")).to_have_count(0)
    page.close()


def test_names_from_a_bundle_cannot_inject_markup(browser, address, png):
    page = browser.new_page()
    page.route("**/v1/classify*", lambda route: route.fulfill(
        status=200, content_type="application/json",
        body='[{"image":"0","task":"<img src=x onerror=alert(1)>","label":"<b>x</b>","score":1,'
             '"alternatives":[{"task":"t","label":"<i>","score":1}],"gates":{"a":1},"residuals":null}]',
    ))  # fmt: skip
    page.goto(f"http://{address}/")
    page.set_input_files("#files", [{"name": "a.png", "mimeType": "image/png", "buffer": png()}])
    sync_api.expect(page.locator("article .label span")).to_have_text("<b>x</b>")
    assert page.locator("article .text img").count() == 0
    page.close()
