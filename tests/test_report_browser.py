"""The report in a real browser: nothing broken, nothing logged, nothing asked of a network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flux2pixel.evaluate.report import write_report
from tests.test_report import demonstration

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
    "--virtual-time-budget=3000",
    "--enable-logging=stderr",
]

WATCH = (
    "<script>window.failures = []; window.onerror = (message) => { window.failures.push(String(message)); };</script>"
)
PROBE = """<script>window.addEventListener("load", () => {
  const shown = () => Array.from(document.querySelectorAll("#grid > *")).filter((card) => !card.hidden).length;
  const choose = (name, value) => {
    const control = document.getElementById("filter-" + name);
    control.value = value;
    control.dispatchEvent(new Event("input"));
    const count = shown();
    control.value = "";
    control.dispatchEvent(new Event("input"));
    return count;
  };
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.body.setAttribute("data-probe", JSON.stringify({
    images: document.images.length,
    broken: Array.from(document.images).filter((image) => image.naturalWidth === 0).length,
    failures: window.failures,
    requests: requests.filter((name) => !name.startsWith("data:")),
    cards: shown(), counting: choose("tag", "counting"), held: choose("held", "true"),
    words: choose("words", "number 7"),
    won: ["base", "converted", "finetuned", "differ", "all", "none"].map((rule) => choose("won", rule)),
    wide: document.documentElement.scrollWidth > window.innerWidth,
  }));
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_the_report_opens_without_an_error_or_a_request(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    report, images = demonstration()
    write_report(report, images, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    page = page.replace("<head>", "<head>" + WATCH, 1).replace("</body>", PROBE + "</body>", 1)
    copy = tmp_path / "probed.html"
    copy.write_text(page, "utf-8")
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    probe = json.loads(html.unescape(found[1]))
    assert probe["images"] == 24 * 12 + 36 + 16
    assert (probe["broken"], probe["failures"], probe["requests"], probe["wide"]) == (0, [], [], False)
    assert (probe["cards"], probe["counting"], probe["held"], probe["words"]) == (24, 4, 8, 1)
    expected = _winners(report)
    assert probe["won"] == expected


def _winners(report: dict) -> list[int]:  # type: ignore[type-arg]
    shares = [[sum(v["correct"] for v in item["verdicts"][m]) for m in item["verdicts"]] for item in report["prompts"]]
    beats = [sum(all(s[i] > s[j] for j in range(3) if j != i) for s in shares) for i in range(3)]
    return [
        *beats,
        sum(len(set(s)) > 1 for s in shares),
        sum(set(s) == {4} for s in shares),
        sum(set(s) == {0} for s in shares),
    ]
