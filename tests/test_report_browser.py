"""The report in a real browser: nothing broken, nothing logged, nothing asked of a network."""

import json
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import demonstration

from flux2pixel.evaluate.report.build import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
LOGGED = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")

PROBE = """(async () => {
  const cards = () => Array.from(document.querySelectorAll("#grid > *")).filter((card) => !card.hidden);
  const choose = (name, value) => {
    const control = document.getElementById("filter-" + name);
    control.value = value;
    control.dispatchEvent(new Event("input"));
    const count = cards().length;
    control.value = "";
    control.dispatchEvent(new Event("input"));
    return count;
  };
  const decoded = () => document.querySelectorAll("#grid [data-sheet]").length;
  const until = async (holds) => {
    for (let left = 200; left > 0 && !holds(); left -= 1) await new Promise((resolve) => setTimeout(resolve, 50));
  };
  cards()[0].scrollIntoView();
  await until(() => cards()[0].dataset.sheet);
  const top = decoded(), last = cards().at(-1);
  last.scrollIntoView();
  await until(() => last.dataset.sheet && !cards()[0].dataset.sheet);
  const later = decoded(), image = new Image();
  image.src = last.dataset.sheet;
  await image.decode();
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const seen = {
    images: document.images.length, top, later, sheet: [image.naturalWidth, image.naturalHeight],
    broken: Array.from(document.images).filter((image) => image.naturalWidth === 0).length,
    requests: requests.filter((name) => !name.startsWith("data:") && !name.startsWith("blob:")),
    shots: last.querySelectorAll(".shot .picture").length,
    states: new Set(Array.from(last.querySelectorAll(".shot")).map((shot) => shot.className)).size,
    reasons: Array.from(last.querySelectorAll(".shot.wrong span")).map((span) => span.textContent),
    link: last.querySelector(".shot").dataset.file,
    wide: document.documentElement.scrollWidth > window.innerWidth,
  };
  return JSON.stringify(Object.assign(seen, {
    cards: cards().length, counting: choose("tag", "counting"), held: choose("held", "true"),
    words: choose("words", "number 7"),
    won: ["base", "converted", "finetuned", "differ", "all", "none"].map((rule) => choose("won", rule)),
  }));
})()"""


class Browser:
    """Headless Chromium driven over its debugging pipe, in real time: what a virtual clock skips are the frames."""

    def __init__(self, profile: Path):
        assert CHROMIUM is not None
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        words = " ".join(map(shlex.quote, [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"]))
        command = f"exec {words} 3<&{to_child} 4>&{from_child}"
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._rest, self._number, self.events = b"", 0, []  # type: ignore[var-annotated]

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; what else arrives is kept in ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 120)[0], "the browser said nothing for two minutes"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)


class Page:
    """A page open in headless Chromium; an exception or a logged line fails at the end."""

    def __init__(self, page: Path, profile: Path):
        self.browser = Browser(profile)
        target = self.browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.browser.events):
            self.browser.events.append(self.browser._receive())

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self.browser.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def ask(self, expression: str) -> Any:
        """The JSON value of an expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        logged = [event for event in self.browser.events if event.get("method") in LOGGED]
        assert "exceptionDetails" not in answer and not logged, (answer, logged)
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"Escape": 27, "Tab": 9, "ArrowRight": 39, "Enter": 13}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )


def probe(page: Path, folder: Path) -> dict[str, Any]:
    """Open a page and return what the probe saw."""
    with Page(page, folder / "profile") as opened:
        seen: dict[str, Any] = json.loads(opened.ask(PROBE))
        return seen


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_the_report_opens_without_an_error_or_a_request(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path)
    write_report(report, gallery, tmp_path / "report.html")
    seen = probe(tmp_path / "report.html", tmp_path)
    assert seen["images"] == 36 + 16
    assert (seen["broken"], seen["requests"], seen["wide"]) == (0, [], False)
    assert (seen["cards"], seen["counting"], seen["held"], seen["words"]) == (24, 4, 8, 1)
    assert seen["won"] == _winners(report)
    assert seen["sheet"] == [4 * 32, 3 * 32] and seen["shots"] == 12 and seen["states"] == 2
    assert set(seen["reasons"]) == {"wrong: expected 3 discs, found 2"} and seen["link"].startswith("images/")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_2212_images_a_model_are_not_decoded_at_once(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, prompts=553, side=160)
    write_report(report, gallery, tmp_path / "report.html")
    seen = probe(tmp_path / "report.html", tmp_path)
    assert (seen["broken"], seen["requests"]) == (0, [])
    assert seen["cards"] == 553 and seen["won"] == _winners(report)
    assert 0 <= seen["top"] < 60 and 0 < seen["later"] < 60, "only cards near the view are decoded"
    assert seen["sheet"] == [4 * 128, 3 * 128] and seen["shots"] == 12
    assert (tmp_path / "report.html").stat().st_size < 40e6


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A demonstration's page, its first card filled."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    report, gallery = demonstration(tmp_path)
    write_report(report, gallery, tmp_path / "report.html")
    with Page(tmp_path / "report.html", tmp_path / "profile") as opened:
        yield opened


FILLED = """(async () => {
  const card = document.querySelector("#grid > *");
  card.scrollIntoView();
  for (let left = 200; left > 0 && !card.dataset.sheet; left -= 1) await new Promise((done) => setTimeout(done, 50));
  return card.dataset.sheet !== undefined;
})()"""


def test_a_row_is_one_tab_stop_and_a_picture_opens_and_closes_by_keyboard(page: Page) -> None:
    assert page.ask(FILLED)
    stops = (
        "Array.from(document.querySelectorAll('{}'), (r) => r.querySelectorAll('.shot:not([tabindex=\"-1\"])').length)"
    )
    assert page.ask(stops.format(".strip .row:not(.captions)")) == [1] * 3
    assert page.ask(stops.format("#grid > :first-child .row")) == [1] * 3
    page.ask("document.querySelector('#grid .shot').focus()")
    label = "document.activeElement.getAttribute('aria-label')"
    assert page.ask(label).startswith("a photo of three green discs, number 0, image 1, ")
    page.press("ArrowRight")
    assert page.ask(label).startswith("a photo of three green discs, number 0, image 2, ")
    assert page.ask(stops.format("#grid > :first-child .row")) == [1] * 3
    page.press("Tab")
    assert page.ask(label).startswith("a photo of three green discs, number 0, image 1, "), "the next model's row"
    page.ask("document.activeElement.click()")
    opened = """(async () => {
      const image = () => document.querySelector("#viewer img");
      for (let left = 100; left > 0 && !image()?.naturalWidth; left -= 1) await new Promise((f) => setTimeout(f, 50));
      return [document.getElementById("viewer").open, image().naturalWidth, image().alt];
    })()"""
    assert page.ask(opened) == [True, 32, "a photo of three green discs, number 0"]
    page.press("Escape")
    assert page.ask("[document.getElementById('viewer').open, document.activeElement.className.split(' ')[0]]") == [
        False, "shot"
    ]  # fmt: skip
    page.ask("document.querySelector('.strip .shot').click()")
    assert page.ask(opened) == [True, 32, "a photo of three green discs, number 0"]


def test_a_phone_sees_the_first_column_and_that_there_is_more(page: Page) -> None:
    page.resize(420)
    seen = page.ask("""(() => {
      const wide = document.querySelector("#scores .wide"), first = wide.querySelector("tbody tr.measure th");
      wide.scrollLeft = 300;
      return {
        page: document.documentElement.scrollWidth <= window.innerWidth, scrolled: wide.scrollLeft,
        stays: Math.abs(first.getBoundingClientRect().left - wide.getBoundingClientRect().left) < 2,
        hint: getComputedStyle(document.querySelector("#scores .hint")).display,
        filters: getComputedStyle(document.querySelector(".filters")).position,
      };
    })()""")
    assert seen == {"page": True, "scrolled": 300, "stays": True, "hint": "block", "filters": "static"}
    page.resize(1400)
    assert page.ask("getComputedStyle(document.querySelector('#scores .hint')).display") == "none"


# Every visible text against the nearest background that is painted behind it (WCAG 2.2, 1.4.3).
CONTRAST = """(() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    const [r, g, b] = parts(color).slice(0, 3).map((c) => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if ((parts(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *:not(script):not(style):not(noscript)")) {
    const words = Array.from(node.childNodes).filter((one) => one.nodeType === 3 && one.textContent.trim());
    if (!words.length || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), svg = node instanceof SVGElement;
    const [a, b] = [light(svg ? style.fill : style.color), light(behind(node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push([node.tagName, node.getAttribute("class"), words[0].textContent.trim(), ratio]);
  }
  return poor;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_aa(page: Page, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.ask(FILLED)
    assert page.ask("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    assert page.ask(CONTRAST) == []


def test_on_paper_no_cell_runs_into_the_next(page: Page) -> None:
    page.call("Emulation.setEmulatedMedia", media="print")
    page.resize(720)
    seen = page.ask("""(() => {
      const cells = Array.from(document.querySelectorAll("td, th"));
      return {
        over: cells.filter((cell) => cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.textContent.trim()),
        wide: document.documentElement.scrollWidth > window.innerWidth,
        hidden: ["nav", ".filters", ".hint"].map((name) => document.querySelector(name).getClientRects().length),
      };
    })()""")
    assert seen == {"over": [], "wide": False, "hidden": [0, 0, 0]}


def _winners(report: dict) -> list[int]:  # type: ignore[type-arg]
    shares = [[sum(v["correct"] for v in item["verdicts"][m]) for m in item["verdicts"]] for item in report["prompts"]]
    beats = [sum(all(s[i] > s[j] for j in range(3) if j != i) for s in shares) for i in range(3)]
    return [
        *beats,
        sum(len(set(s)) > 1 for s in shares),
        sum(set(s) == {4} for s in shares),
        sum(set(s) == {0} for s in shares),
    ]
