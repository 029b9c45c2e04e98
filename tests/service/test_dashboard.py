"""The dashboard in a real browser: figures that are true, by keyboard, in every width, and nothing from elsewhere."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.core import ChunkInfo
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.documents.registry import StoredDocument
from kvloom.testing.chunks import make_blob, make_key

from .browser import Page, chromium
from .serving import Service, service_in_thread

pytestmark = pytest.mark.slow

PICTURES = os.environ.get("KVLOOM_TEST_PICTURES")
SHOWN_S = 40.0 if PICTURES else 4.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    nbytes = make_blob(0, numbers=5000).nbytes
    tiers = [HostTier(10 * nbytes), DiskTier(folder / "disk", 64 << 20)]
    with service_in_thread(folder, tiers) as service:
        with service.client(shared_memory=False) as client:
            for number in range(25):
                client.put(
                    make_key(number), make_blob(number, numbers=5000), ChunkInfo(namespace="rag" if number % 3 else "")
                )
            for number in range(30):
                client.get(make_key(number))
            client.match([make_key(1)])
        documents = service.context.documents
        for name, uses in (("faq", 3), ("handbook", 7), ("new", 0)):
            each = StoredDocument("default", "tiny", name, "text", 5, bytes(32), "ready" if uses else "registered")
            documents.add([each])
            for _ in range(uses):
                documents.used(each)
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page, service: Service) -> Page:
    browser.open(service.url)
    browser.wait("document.readyState === 'complete' && !!document.getElementById('token')")
    browser.run("sessionStorage.clear()")
    browser.errors.clear()
    browser.requests.clear()
    browser.open(f"{service.url}/")
    browser.wait("document.readyState === 'complete' && !document.getElementById('sign-in').hidden")
    return browser


def signed_in(page: Page, service: Service, token: str | None = None) -> None:
    page.open(f"{service.url}/#token={token or service.token}")
    page.run("location.reload()")
    page.wait("document.getElementById('status')?.textContent === 'Live'")


def test_the_figures_are_those_of_the_service(page: Page, service: Service) -> None:
    signed_in(page, service)
    text = page.run("document.body.innerText")
    assert "token" not in page.run("location.href")
    stats = service.context.store.stats()
    assert f"Hit ratio\n{100 * stats.hits / stats.lookups:.0f} %" in text
    cards = page.run("[...document.querySelectorAll('#tiers li')].map(card => card.innerText)")
    assert len(cards) == 2 and cards[0].startswith("host") and "answers" in cards[0]
    for card, tier in zip(cards, stats.tiers, strict=True):
        words = card.split()
        for name, value in (("Chunks", tier.chunks), ("Hits", tier.hits), ("Evictions", tier.evictions)):
            assert words[words.index(name) + 1] == str(value), card
    warmest = page.run("document.querySelector('#namespaces tr').innerText")
    assert warmest.split() == ["default/rag", "16", "384", "KiB"]
    hottest = page.run("[...document.querySelectorAll('#documents tr')].map(row => row.innerText)")
    assert [row.split("\t")[0] for row in hottest] == ["handbook", "faq", "new"] and "7" in hottest[0].split("\t")
    assert "miss: absent" in text and "default/rag" in text and "POST /v1/match" in text
    assert page.errors == []
    assert all(url.startswith((service.url, "data:")) for url in page.requests)


def test_it_is_live(page: Page, service: Service) -> None:
    signed_in(page, service)
    before = page.run("document.querySelector('#overview dd').textContent")
    service.client(shared_memory=False).put(make_key(500), make_blob(500))
    page.wait(f"document.querySelector('#overview dd').textContent !== {before!r}")
    service.client().delete(make_key(500))


def test_by_keyboard_alone(page: Page, service: Service) -> None:
    page.run("document.getElementById('token').focus()")
    page.type("wrong")
    page.press("Enter", 13, "\r")
    page.wait("document.getElementById('problem').textContent.includes('token')")
    assert page.run("document.activeElement.id") == "token"
    page.type(service.token)
    page.press("Enter", 13, "\r")
    page.wait("document.getElementById('status').textContent === 'Live'")
    page.wait("document.activeElement.id === 'main'")
    stops = []
    for _ in range(6):
        page.press("Tab", 9)
        stops.append(page.run(FOCUSED))
    assert {"DIV#latency-title", "DIV#namespaces-title", "DIV#documents-title"} <= set(stops)
    page.run("document.getElementById('sign-out').focus()")
    page.press("Enter", 13, "\r")
    page.wait("!document.getElementById('sign-in').hidden && document.activeElement.id === 'token'")
    assert page.run("sessionStorage.getItem('token')") is None


def test_what_a_screen_reader_finds(page: Page, service: Service) -> None:
    signed_in(page, service)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    found = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]}
    roles = {role for role, _ in found}
    assert {"banner", "main", "contentinfo", "heading", "table", "rowheader", "columnheader", "status"} <= roles
    assert {("heading", title) for title in ("Overview", "Tiers", "host answers", "Hits and misses")} <= found
    assert any(role == "image" and "filled" in name for role, name in found)
    assert not [name for role, name in found if role in ("button", "textbox", "image", "table") and not name]


def test_a_tenant_sees_its_own(page: Page, service: Service) -> None:
    service.client(service.new_token("other-tenant")).put(make_key(1), make_blob(1), ChunkInfo(namespace="private"))
    signed_in(page, service, service.new_token("other-tenant", ["read"]))
    text = page.run("document.body.innerText")
    assert "private" in text and "rag" not in text and "Tiers" not in text
    told = service.ask("GET", "/v1/dashboard", token=service.new_token("third", ["read"])).json()
    assert told["service"] is None and told["namespaces"] == [] and told["chunks"] == 0


def test_every_width_shows_all_without_scrolling_sideways(page: Page, service: Service) -> None:
    signed_in(page, service)
    with service.client(shared_memory=False) as client:  # something to look at: tiers fill, and drain
        for number in range(40):
            client.put(make_key(600 + number), make_blob(600 + number, numbers=5000))
            client.get(make_key(600 + number % 7))
            time.sleep(SHOWN_S / 60)
        for number in range(40):
            client.delete(make_key(600 + number))
            time.sleep(SHOWN_S / 120)
    page.wait("document.querySelectorAll('#recent path').length === 8")
    page.wait("document.querySelectorAll('#tiers path').length === 4")
    for width, height, dark in ((1440, 1000, False), (800, 1100, True), (390, 1800, False)):
        data = page.picture(width, height, dark=dark)
        assert data[:4] == b"\x89PNG"
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), width
        if PICTURES:
            Path(PICTURES, f"dashboard-{width}{'-dark' if dark else ''}.png").write_bytes(data)
        contrast = page.run(CONTRAST)
        assert contrast >= 4.5, (width, contrast)


FOCUSED = """(() => {
  const element = document.activeElement;
  return element.tagName + '#' + (element.getAttribute('aria-labelledby') || element.id);
})()"""
CONTRAST = """(() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let least = 21;
  for (const element of document.querySelectorAll("h1, h2, p, th, td, dt, dd, caption, button, span")) {
    if (!element.innerText || !element.offsetParent) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(back(element))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
})()"""


def test_the_page_may_load_nothing_from_elsewhere(service: Service) -> None:
    page = service.ask("GET", "/", token=None)
    assert page.status == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert b"http://" not in page.body and b"https://" not in page.body
