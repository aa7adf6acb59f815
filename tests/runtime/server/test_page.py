"""The chat page and the docs in Chromium, on a phone and on a desk, by keyboard alone, with a console that stays silent."""

import http.client
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import chromium
from script_engine import script_model
from serving import serving

from headfold.runtime.server.settings import Settings

ANSWER = "<b>Spaces</b>\n  and lines stay, however long a line of it is: " + "word " * 30
NO_CHROMIUM = pytest.mark.skipif(not shutil.which("chromium"), reason="Debian's chromium is not installed")
LAST = "[...document.querySelectorAll('.assistant')].at(-1)"


def shot(page, name: str, directory: Path) -> None:
    """A picture, for people: HEADFOLD_SHOTS names where it stays."""
    path = Path(os.environ.get("HEADFOLD_SHOTS", directory)) / f"{name}.png"
    page.screenshot(path)
    assert path.stat().st_size > 5000


def fits(page) -> bool:
    return page.value("document.documentElement.scrollWidth <= window.innerWidth")


@NO_CHROMIUM
@pytest.mark.parametrize("width", [390, 1280])
def test_a_chat_by_keyboard(width, tmp_path) -> None:
    with (
        script_model(tmp_path / "script", lambda prompt: ANSWER if "first" in prompt else "on and " * 500) as model,
        serving({"script": model}) as address,
        chromium(tmp_path / "profile") as page,
    ):
        page.open(f"{address}/", width)
        page.until("document.querySelector('#model').value === 'script'")
        assert page.value("document.activeElement.id") == "text"
        assert page.value("document.querySelector('#form').getBoundingClientRect().bottom <= innerHeight")
        shot(page, f"chat-{width}-empty", tmp_path)
        page.type("the first line")
        page.press("Enter", shift=True)
        page.type("the second line")
        page.press("Enter")
        page.until("document.querySelectorAll('.assistant small').length === 1")
        assert page.value(f"{LAST}.querySelector('p').textContent") == ANSWER
        assert page.value("document.querySelector('.user p').textContent") == "the first line\nthe second line"
        assert page.value("document.activeElement.id") == "text"
        assert model.backend.prompts[-1] == "<|im_start|>user\nthe first line\nthe second line<|im_end|>\n"
        assert fits(page)
        shot(page, f"chat-{width}", tmp_path)
        model.backend.answer = lambda _: "on and " * 500
        model.backend.hold()
        page.type("more")
        page.press("Enter")
        model.backend.turn.release(20)
        page.until(f"{LAST}.textContent.length > 5")
        assert page.value("document.querySelector('#send').textContent") == "Stop"
        page.press("Escape")
        page.until("document.querySelector('#send').textContent === 'Send'")
        model.backend.turn.release(100_000)
        assert 5 < page.value(f"{LAST}.textContent.length") < 2000
        assert page.complaints == []


@NO_CHROMIUM
def test_a_server_with_a_key_asks_for_it_and_tells_its_errors(tmp_path) -> None:
    with (
        script_model(tmp_path / "script", lambda _: "yes", capacity=200) as model,
        serving({"script": model}, Settings(key="k")) as address,
        chromium(tmp_path / "profile") as page,
    ):
        page.open(f"{address}/", 390)
        page.until("document.querySelector('#error').textContent.includes('API key')")
        assert page.value("document.querySelector('#settings').open")
        shot(page, "chat-390-key", tmp_path)
        page.until("document.activeElement.id === 'key'")
        page.type("k")
        page.press("Enter")
        page.until("document.querySelector('#model').value === 'script' && document.querySelector('#error').hidden")
        page.value("document.querySelector('#text').focus()")
        page.type("far too long " * 40)
        page.press("Enter")
        page.until("document.querySelector('#error').textContent.includes('over the bundle')")
        assert page.value("document.querySelector('#text').value").startswith("far too long")
        assert page.value("document.querySelectorAll('.message').length") == 0
        page.value("document.querySelector('#text').value = ''")
        page.type("short")
        page.press("Enter")
        page.until(f"{LAST}?.textContent.startsWith('yes')")
        assert [
            complaint for complaint in page.complaints if " 401 " not in complaint and " 400 " not in complaint
        ] == []


@NO_CHROMIUM
@pytest.mark.parametrize("width", [390, 1280])
def test_docs(width, tmp_path) -> None:
    with (
        script_model(tmp_path / "script", lambda _: "yes") as model,
        serving({"script": model}) as address,
        chromium(tmp_path / "profile") as page,
    ):
        page.open(f"{address}/docs", width)
        assert (
            page.value("[...document.querySelectorAll('h2')].map(one => one.innerText)")[0]
            == "POST /v1/chat/completions"
        )
        assert "max_completion_tokens" in page.value("document.body.innerText")
        assert fits(page)
        shot(page, f"docs-{width}", tmp_path)
        assert page.complaints == []


class Links(HTMLParser):
    """What a page refers to, and the labels of its fields."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fields: set[str] = set()
        self.labels: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := found.get(name))]
        if tag in ("input", "select", "textarea"):
            self.fields.add(found["id"] or "")
        if tag == "label":
            self.labels.add(found["for"] or "")


def test_nothing_of_a_page_comes_from_elsewhere_and_every_field_has_a_label(tmp_path) -> None:
    with script_model(tmp_path / "script", lambda _: "yes") as model, serving({"script": model}) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"))

        def get(path: str) -> tuple[str, str]:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200
            return response.read().decode(), response.headers["content-security-policy"] or ""

        seen = {"/openapi.json"}
        for path in ("/", "/docs"):
            text, policy = get(path)
            assert "default-src 'none'" in policy
            page = Links(text)
            assert page.fields == page.labels
            for link in page.links:
                assert link == "data:," or re.fullmatch(r"/[a-z./]*", link)
                seen |= {link} - {"data:,"}
        for path in seen:
            assert "http://" not in get(path)[0].replace(address, "")
