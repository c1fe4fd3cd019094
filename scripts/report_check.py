"""Looks at report pages as a reader does: `python scripts/report_check.py runs/digits/report.html`.

Opens the page in a headless Chromium (Debian: `apt-get install chromium chromium-driver`) at the
widths of a desk and of a phone, light and dark, and reports what would trouble a reader: what axe
finds (`pip install axe-core-python`: contrast, alternative texts, headings, tables), a page wider
than the window, requests to the network, errors in the console, and charts that show no values
under the pointer. With `--shots DIR` also writes a picture of each whole page. Exit code 1 if
anything was found.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
VIEWS = tuple(itertools.product((1280, 390), ("light", "dark")))
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
_AXE = "node_modules/axe-core/axe.min.js"
_STARTING = 30  # seconds until the driver answers


def missing_browser() -> str:
    """What is not installed, or ""."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    found = {"chromium": chromium, "chromedriver": shutil.which("chromedriver")}
    absent = [name for name, path in found.items() if path is None]
    return f"not installed: {', '.join(absent)} (packages chromium, chromium-driver)" * bool(absent)


def find_axe(path: str | None = None) -> pathlib.Path | None:
    """The file axe.min.js: as given, by AXE_CORE, below the checkout, or of axe-core-python."""
    package = importlib.util.find_spec("axe_core_python")
    installed = package and pathlib.Path(package.origin).with_name("axe.min.js")
    for candidate in (path, os.environ.get("AXE_CORE"), ROOT / _AXE, installed):
        if candidate and pathlib.Path(candidate).is_file():
            return pathlib.Path(candidate)
    return None


class Browser:
    """A headless Chromium, driven over the WebDriver protocol; a context manager."""

    def __init__(self):
        self._held = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as held:
            folder = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            driver = subprocess.Popen(
                ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True,
            )  # fmt: skip
            held.callback(_end, driver)
            self._address = f"http://127.0.0.1:{_port(driver)}/session"
            options = {
                "goog:chromeOptions": {"args": [*FLAGS, f"--user-data-dir={folder}"]},
                "goog:loggingPrefs": {"browser": "ALL"},
                "timeouts": {"script": 100_000},  # axe looks at every letter
            }
            found = self._send("", {"capabilities": {"alwaysMatch": options}})
            self._address += f"/{found['sessionId']}"
            held.callback(self._send, "", method="DELETE")
            self._held = held.pop_all()
        return self

    def __exit__(self, *error):
        return self._held.__exit__(*error)

    def open(self, page: pathlib.Path, width: int, theme: str) -> None:
        """Shows a file in a window of that width, with that preference of colours."""
        metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.protocol("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.protocol("Emulation.setEmulatedMedia", {"features": [feature]})
        self._send("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments, wait: bool = False):
        """Value of a script, injected past the page's own policy; `wait`: by its callback."""
        body = {"script": script, "args": list(arguments)}
        return self._send("/execute/async" if wait else "/execute/sync", body)

    def point_at(self, x: float, y: float) -> None:
        """Moves the pointer to a place of the window."""
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        source = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self._send("/actions", {"actions": [{**source, "actions": [move]}]})

    def messages(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        found = self._send("/se/log", {"type": "browser"})
        return [item["message"] for item in found if item["level"] in ("WARNING", "SEVERE")]

    def picture(self, whole: bool = True) -> bytes:
        """PNG of the page."""
        found = self.protocol("Page.captureScreenshot", {"captureBeyondViewport": whole})
        return base64.b64decode(found["data"])

    def protocol(self, command: str, parameters: dict):
        """A command of the DevTools protocol."""
        return self._send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _send(self, path, body=None, method="POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error


def _port(driver) -> int:
    """The port that the driver says it listens on."""
    until = time.monotonic() + _STARTING
    for line in driver.stdout:
        if "on port " in line and "started" in line:
            return int(line.rsplit("port ", 1)[1].strip(" .\n"))
        if time.monotonic() > until:
            break
    raise RuntimeError("chromedriver did not start.")


def _end(process) -> None:
    process.terminate()
    process.wait()
    process.stdout.close()


def check(
    browser: Browser,
    page: pathlib.Path,
    axe: pathlib.Path | None,
    shots: pathlib.Path | None = None,
    views: Iterable[tuple[int, str]] = VIEWS,
) -> list[str]:
    """What would trouble a reader of the page, in lines; empty if nothing."""
    troubles = []
    for width, theme in views:
        where = f"{page.name} at {width} pixels, {theme}"
        browser.open(page, width, theme)
        wide = browser.run(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        if wide[0] > wide[1]:
            troubles.append(f"{where}: the page is {wide[0]} pixels wide")
        asked = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
        troubles += [f"{where}: requested {name}" for name in asked if name[:5] != "data:"]
        troubles += [f"{where}: {text}" for text in browser.messages() if "favicon" not in text]
        troubles += [f"{where}: {text}" for text in _values(browser)]
        if axe is not None:
            troubles += [f"{where}: {text}" for text in _axe_finds(browser, axe)]
        if shots is not None:
            shots.mkdir(parents=True, exist_ok=True)
            (shots / f"{page.stem}-{width}-{theme}.png").write_bytes(browser.picture())
    return troubles


_MIDDLE_OF_CHART = """
const c = document.querySelectorAll('svg.chart')[arguments[0]];
if (!c.getClientRects().length) return null;
c.scrollIntoView({block: 'center', behavior: 'instant'});
const s = c.querySelectorAll('.hit');
const r = s[s.length >> 1].getBoundingClientRect();
return [r.x + r.width / 2, r.y + r.height / 2];
"""
_TABLES_SHOWN = """
const tips = document.querySelectorAll('svg.chart')[arguments[0]].querySelectorAll('.tip');
return [...tips].filter(t => getComputedStyle(t).visibility == 'visible').length;
"""
_AXE_RUN = """
const done = arguments[arguments.length - 1];
const shown = v => [v.id, v.help, v.nodes.length, '' + v.nodes[0].target,
                    v.nodes[0].failureSummary];
axe.run(document).then(r => done(r.violations.map(shown)),
                       e => done([['axe', '' + e, 0, '', '']]));
"""


def _values(browser) -> list[str]:
    """Visible charts in which nothing appears under the pointer."""
    count = browser.run("return document.querySelectorAll('svg.chart').length")
    silent = []
    for index in range(count):
        place = browser.run(_MIDDLE_OF_CHART, index)
        if place is None:
            continue
        browser.point_at(*place)
        shown = browser.run(_TABLES_SHOWN, index)
        if shown != 1:
            silent.append(f"chart {index + 1} shows {shown} tables of values under the pointer")
    browser.point_at(0, 0)
    browser.run("window.scrollTo({top: 0, behavior: 'instant'})")
    return silent


def _axe_finds(browser, axe) -> list[str]:
    browser.run(axe.read_text(encoding="utf-8"))
    # Also what is folded away is read by somebody.
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.run(_AXE_RUN, wait=True)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = false)")
    return [f"axe {v[0]}: {v[1]} ({v[2]} times, first at {v[3]}: {v[4]})" for v in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pages", nargs="+", type=pathlib.Path, metavar="PAGE.html")
    parser.add_argument("--axe", help=f"axe.min.js; default: AXE_CORE, {_AXE}, or axe-core-python")
    parser.add_argument("--shots", type=pathlib.Path, metavar="DIR", help="write pictures there")
    options = parser.parse_args()
    if missing_browser():
        print(missing_browser(), file=sys.stderr)
        return 2
    axe = find_axe(options.axe)
    if axe is None:
        print("without axe, which is not installed: pip install axe-core-python", file=sys.stderr)
    with Browser() as browser:
        troubles = [
            trouble
            for page in options.pages
            for trouble in check(browser, page, axe, options.shots)
        ]
    print("\n".join(troubles) or "Nothing found.")
    return int(bool(troubles))


if __name__ == "__main__":
    sys.exit(main())
