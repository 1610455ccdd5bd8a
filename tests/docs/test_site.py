"""The built site in a real browser: `make test-docs` builds it, then runs this with the system's chromium.

Screenshots of five pages are left in docs/_build/screenshots.
"""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="make test-docs installs it")
axe_package = pytest.importorskip("axe_playwright_python", reason="make test-docs installs it")

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SITE = REPOSITORY / "docs/_build/html"
SCREENSHOTS = REPOSITORY / "docs/_build/screenshots"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
CONTENT = [page for page in PAGES if page not in ("genindex.html", "py-modindex.html", "search.html")]
SHOWN = ["index", "learn/index", "nbs/20_router", "performance", "api/pithtrain.layers.router"]
AXE = (Path(axe_package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Where a page's links lead, the ids it has, and its images."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids, self.images = list[str](), set[str](), list[dict]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.ids |= {given["id"]} if given.get("id") else set()
        if tag == "img":
            self.images.append(given)
        if link := given.get("href" if tag in ("a", "link") else "src"):
            self.links.append(link)


@functools.cache
def parsed(page: str) -> Page:
    return Page((SITE / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(SITE))

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator["sync_api.Browser"]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("no chromium on the PATH: apt-get install chromium", pytrace=False)
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Watched:
    """A tab that remembers what went wrong in it."""

    def __init__(self, browser, address: str, scheme: str = "light", width: int = 1280):
        self.address, self.wrong = address, list[str]()
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.tab = self.context.new_page()
        self.tab.on("console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("requestfailed", self.failed)
        self.tab.on("request", self.leaving)

    def failed(self, request) -> None:
        if request.failure != "net::ERR_ABORTED":  # which it is when the tab leaves a page that is still loading
            self.wrong.append(f"{request.failure}: {request.url}")

    def leaving(self, request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"a request leaves the site: {request.url}")

    def open(self, page: str) -> None:
        self.wrong.clear()
        self.tab.goto(self.address + page)
        self.tab.evaluate("() => window.MathJax?.startup?.promise")

    def violations(self) -> list[str]:
        """What axe calls serious or worse, each with the first element that has it."""
        self.tab.evaluate(AXE)
        found = self.tab.evaluate("() => axe.run(document, {resultTypes: ['violations']})")["violations"]
        worst = [violation for violation in found if violation["impact"] in ("serious", "critical")]
        return [f"{v['id']} ({len(v['nodes'])}): {v['nodes'][0]['html'][:200]}" for v in worst]

    def overhang(self) -> int:
        """Pixels by which the page is wider than the screen."""
        return self.tab.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="session")
def desk(browser, address) -> Watched:
    return Watched(browser, address)


def test_the_site_is_built():
    assert len(CONTENT) > 50, "make docs builds the site"
    notebooks = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "nbs").rglob("*.py")}
    assert {page.replace(".html", ".py") for page in CONTENT if page.startswith("nbs/")} == notebooks


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_cleanly_fits_a_phone_and_can_be_used_by_all(desk: Watched, page: str):
    desk.open(page)
    assert not desk.wrong
    assert desk.tab.locator("mjx-merror").count() == 0, "a formula cannot be drawn"
    assert not desk.violations()
    desk.tab.set_viewport_size({"width": 390, "height": 844})
    wider = desk.overhang()
    desk.tab.set_viewport_size({"width": 1280, "height": 900})
    assert wider <= 0, f"on a phone the page is {wider} pixels too wide"


@pytest.mark.parametrize("page", [f"{page}.html" for page in SHOWN])
def test_a_dark_page_can_be_used_by_all(browser, address, page: str):
    dark = Watched(browser, address, scheme="dark")
    dark.open(page)
    assert not dark.violations()
    dark.context.close()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for link in parsed(page).links:
        target, anchor = urldefrag(urljoin(f"http://site/{page}", link))
        if not target.startswith("http://site/"):
            continue
        inside = unquote(target.removeprefix("http://site/").partition("?")[0]) or "index.html"
        assert (SITE / inside).is_file(), f"{link}: no such file"
        if anchor and inside.endswith(".html"):
            assert unquote(anchor) in parsed(inside).ids, f"{link}: no such place"


@pytest.mark.parametrize("page", CONTENT)
def test_a_page_has_its_twins_and_figures_are_described(page: str):
    name = page.removesuffix(".html")
    assert all(image.get("alt", "").strip() for image in parsed(page).images)
    assert (SITE / f"{name}.md").read_text(encoding="utf-8").strip()
    assert f"({name}.md)" in (SITE / "llms.txt").read_text(encoding="utf-8")
    notebook = json.loads((SITE / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["cells"]
    last = name.rpartition("/")[2]
    source = f"{last}.py" if (SITE / f"{name}.py").exists() else f"{last}.source.md"
    assert {f"{last}.ipynb", f"{last}.md", source} <= set(parsed(page).links)
    if name.startswith("nbs/"):
        source = (REPOSITORY / f"{name}.py").read_text(encoding="utf-8")
        assert (SITE / f"{name}.py").read_text(encoding="utf-8") == source
        assert any(output for cell in notebook["cells"] for output in cell.get("outputs", []))


def test_search_finds_the_router(desk: Watched):
    desk.open("index.html")
    desk.tab.locator("input[name=q]").first.fill("router")
    desk.tab.keyboard.press("Enter")
    first = desk.tab.locator("ul.search li a").first
    first.wait_for()
    desk.tab.wait_for_load_state("networkidle")  # it fetches the pages that it found, for their summaries
    found = desk.tab.locator("ul.search li a").all_inner_texts()
    assert any("which experts a token visits" in text for text in found[:5]), found[:5]
    first.click()
    desk.tab.wait_for_load_state("networkidle")
    assert "router" in desk.tab.content().lower()
    assert not desk.wrong


def test_the_toggle_goes_through_light_and_dark(desk: Watched):
    desk.open("index.html")
    colours, button = set(), desk.tab.locator("button.theme-toggle:visible").first
    for _ in range(3):
        button.click()
        colours.add(desk.tab.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2, colours
    desk.tab.evaluate("() => localStorage.clear()")


def test_code_is_copied(desk: Watched):
    desk.open("nbs/20_router.html")
    cell = desk.tab.locator("div.highlight", has_text="def route_one").first
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = desk.tab.evaluate("() => navigator.clipboard.readText()")
    assert copied.startswith("def route_one(x, router, top_k):\n    p = torch.softmax")


def test_mathematics_is_drawn(desk: Watched):
    desk.open("nbs/20_router.html")
    assert desk.tab.locator("mjx-container").count() > 5


def test_the_pages_lead_on(desk: Watched):
    desk.open("nbs/20_router.html")
    assert desk.tab.locator("a.next-page").get_attribute("href").endswith("21_balance.html")
    assert desk.tab.locator("a.prev-page").count() == 1


@pytest.mark.parametrize("page", SHOWN)
def test_screenshots(browser, address, page: str):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for scheme, width in (("light", 1400), ("dark", 1400), ("light", 390)):
        seen = Watched(browser, address, scheme, width)
        seen.open(f"{page}.html")
        file = SCREENSHOTS / f"{page.replace('/', '_')}-{scheme}-{width}.png"
        seen.tab.screenshot(path=file)
        assert file.stat().st_size > 20_000
        seen.context.close()
