"""The report in a real browser: nothing broken, nothing logged, nothing asked of a network."""

import json
import os
import select
import shlex
import shutil
import subprocess
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
    link: last.querySelector("a.shot").getAttribute("href"),
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


def probe(page: Path, folder: Path) -> dict[str, Any]:
    """Open a page in headless Chromium and return what the probe saw; an exception or a logged line fails."""
    browser = Browser(folder / "profile")
    try:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            browser.call(f"{domain}.enable", session)
        browser.call("Page.navigate", session, url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in browser.events):
            browser.events.append(browser._receive())
        answer = browser.call("Runtime.evaluate", session, expression=PROBE, awaitPromise=True, returnByValue=True)
        logged = [event for event in browser.events if event.get("method") in LOGGED]
        assert "exceptionDetails" not in answer and not logged, (answer, logged)
        seen: dict[str, Any] = json.loads(answer["result"]["value"])
        return seen
    finally:
        browser.close()


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


def _winners(report: dict) -> list[int]:  # type: ignore[type-arg]
    shares = [[sum(v["correct"] for v in item["verdicts"][m]) for m in item["verdicts"]] for item in report["prompts"]]
    beats = [sum(all(s[i] > s[j] for j in range(3) if j != i) for s in shares) for i in range(3)]
    return [
        *beats,
        sum(len(set(s)) > 1 for s in shares),
        sum(set(s) == {4} for s in shares),
        sum(set(s) == {0} for s in shares),
    ]
