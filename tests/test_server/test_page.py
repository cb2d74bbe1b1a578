# SPDX-License-Identifier: Apache-2.0
"""The page at /: its files as they are served, without a browser. test_page_browser.py uses it."""

import re
from html.parser import HTMLParser

import pytest

from server.routes.page import FOLDER, HEADERS, PATHS
from tests.test_server.page_backend import RECORDED

TYPES = {"/": "text/html", ".css": "text/css", ".js": "text/javascript"}
HTML, CSS = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "page.css"))
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js")}
JS = "\n".join(SCRIPTS.values())


class Elements(HTMLParser):
    """All start tags as (tag, attributes), and for every control whether a label is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.unlabelled: list[dict[str, str | None]] = []
        self._open: list[str] = []
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.all.append((tag, attributes))
        if tag in ("input", "textarea", "select") and "label" not in self._open:
            self.unlabelled.append(attributes)
        if tag not in ("input", "meta", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.text[self._open[-1]] = self.text.get(self._open[-1], "") + data.strip()


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("keys", [[], ["a key"]])
def test_the_files_are_served_to_all_with_the_policy(app_client, path, keys):
    client = app_client(keys)
    answer = client.get(path)
    kind = TYPES["/" if path == "/" else path[path.rindex(".") :]]
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
    assert answer.text in (HTML, CSS, *SCRIPTS.values())
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    head = client.head(path)
    assert head.status_code == 200 and head.content == b"" and head.headers["etag"] == answer.headers["etag"]


def test_nothing_else_is_served_from_the_folder_of_the_page(app_client):
    assert len(PATHS) == 2 + len(SCRIPTS)
    for name in ("page.html", "nosuch.js", "..%2Fauth.py"):
        assert app_client([]).get(f"/page/{name}").status_code == 404
        assert app_client(["a key"]).get(f"/page/{name}").status_code == 401


def test_every_module_is_imported_and_none_is_missing():
    imported = re.findall(r'from "\./([^"]+)"', JS)
    assert {*imported, "page.js"} == set(SCRIPTS) and 'src="page/page.js"' in HTML


def test_with_a_key_the_page_is_open_and_its_data_is_not(app_client):
    client = app_client(["a key"])
    assert client.get("/pvq/info").status_code == client.get("/v1/models").status_code == 401


def test_the_policy_allows_only_what_the_page_brings():
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {name for name, value in policy.items() if value == "'self'"} == {
        "script-src",
        "style-src",
        "connect-src",
    }
    assert not re.search(r"unsafe|\*|https?:", HEADERS["Content-Security-Policy"])


def test_nothing_inline_and_nothing_from_elsewhere():
    elements = Elements()
    for tag, attributes in elements.all:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "action"):
            assert re.match(r"[\w/#.]+$|data:image/svg\+xml,", attributes.get(name) or "#"), attributes
    assert "script" not in elements.text and "style" not in elements.text
    urls = re.findall(
        r"(?:https?:)?//[\w.]+", "".join(line.partition("// ")[0] for line in (CSS + JS).splitlines())
    )
    assert urls == [] and "@import" not in CSS and "innerHTML" not in JS


def test_every_control_has_a_label_and_every_id_is_there_once():
    elements = Elements()
    assert elements.unlabelled == []
    ids = [attributes["id"] for _, attributes in elements.all if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.all:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
    used = set(re.findall(r'\$\("([\w-]+)"\)|show\("([\w-]+)"', JS))
    assert {a or b for a, b in used} <= set(ids)


def _colours(scheme: str) -> dict[str, str]:
    light, dark = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))


def _luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("colour", "ground", "least"),  # AA: 4.5 for text, 3 for controls and what carries meaning
    [
        *[(text, ground, 4.5) for text in ("text", "muted") for ground in ("card", "ground")],
        ("accent", "ground", 4.5),
        ("on-accent", "accent", 4.5),
        ("bad", "card", 4.5),
        *[(mark, "card", 3.0) for mark in ("control", "accent", "good", "wait")],
    ],
)
def test_contrast(scheme, colour, ground, least):
    colours = _colours(scheme)
    darker, lighter = sorted((_luminance(colours[colour]), _luminance(colours[ground])))
    assert (lighter + 0.05) / (darker + 0.05) >= least


def test_the_newest_name_of_each_metric_is_one_that_a_server_has():
    table = re.search(r"const METRICS = \{(.*?)\n\};", JS, flags=re.DOTALL)[1]
    newest = re.findall(r'^  \w+: \[\s*"([^"]+)"', table, flags=re.MULTILINE)
    recorded = set(re.findall(r"^([\w:]+)", RECORDED, flags=re.MULTILINE))
    assert len(newest) == 15
    assert set(newest) <= recorded
