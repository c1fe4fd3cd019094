"""Opens the built site in headless Chromium as its readers do.

    python scripts/site/check.py site/0.2 [--screenshots DIR]

Checked are: every link and picture inside the site (of all pages, read as files); in the browser,
of one page per section, in light and dark and on a phone: nothing is asked of another host, no
script fails, no page scrolls sideways, formulas are laid out as formulas, axe finds the contrast of
all text sufficient and no picture without words, the reader can switch to the dark, the search
finds a name, and it does so from plain files without a server, too.
"""

import argparse
import functools
import http.server
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.parse
from html.parser import HTMLParser

# Flags of a browser that stays on this machine.
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
PAGES = (
    "index.html",
    "tutorials/first_certificate.html",
    "howto/from_foolbox.html",
    "reference/layers.html",
    "explanation/mathematics.html",
    "certificates.html",
)
PHONE, DESK = 390, 1280
# A name and the page where the search must lead to.
SOUGHT = ("certified radius", "CayleyDense")


class _Page(HTMLParser):
    """Links, pictures and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors, self.blind = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        self.anchors.update(value for name, value in attributes if name in ("id", "name") and value)
        for name in ("href", "src"):
            if held.get(name) and tag != "base":
                self.targets.append(held[name])
        if tag == "img" and not held.get("alt"):
            self.blind.append(held.get("src"))


def broken_links(folder):
    """Sentences about links and pictures of the site's pages that lead nowhere."""
    pages = {p: _Page(p.read_text(encoding="utf-8")) for p in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        if name.name == "404.html":  # its links are for any depth
            continue
        for target in page.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            goal = path
            if parts.path:
                goal = (path.parent / urllib.parse.unquote(parts.path)).resolve()
                goal = goal / "index.html" if goal.is_dir() else goal
            anchor = urllib.parse.unquote(parts.fragment)
            if not goal.exists():
                found.append(f"{name} has a link to {target}, which is not there.")
            elif anchor and goal in pages and not anchor.startswith("__"):
                if anchor not in pages[goal].anchors:
                    found.append(f"{name} has a link to {target}, a page without that place.")
        found += [f"{name} has a picture without words: {source}." for source in page.blind]
    return found


class Browser:
    """Chromium with a fresh profile, that remembers what pages asked for and complained of."""

    def __init__(self):
        from selenium import webdriver

        self.profile = tempfile.mkdtemp(prefix="chromium-")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        for flag in (*FLAGS, f"--user-data-dir={self.profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(120)  # axe looks at every letter of long pages

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.driver.quit()
        shutil.rmtree(self.profile, ignore_errors=True)

    def size(self, width, height=900):
        """As wide as a phone or a desk, whatever the least width of a window is."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def prefer(self, scheme):
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )

    def forget(self, address):
        """As a reader who was never here."""
        self.driver.get("about:blank")
        if address.startswith("http"):
            origin = "/".join(address.split("/")[:3])
            self.driver.execute_cdp_cmd(
                "Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"}
            )

    def open(self, address):
        self.driver.get(address)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, script):
        """What a script hands to its last argument."""
        return self.driver.execute_async_script(script)

    def write(self, selector, text):
        """With a mouse and keys, as a reader does."""
        field = self.driver.find_element("css selector", selector)
        field.click()
        field.send_keys(text)

    def until(self, script, seconds=15):
        """The first true answer of a script, or None."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.run(script)
            if found:
                return found
            time.sleep(0.1)
        return None

    def asked(self):
        """Addresses that pages asked for since the last call."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found

    def complaints(self):
        """What scripts and the loading of files complained of since the last call."""
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    def shot(self, path):
        self.driver.save_screenshot(str(path))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *unused):
        pass


def served(folder):
    """A server of a folder on this machine, with its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


_WIDE = """
const wide = [];
for (const e of document.querySelectorAll('.md-content *')) {
  const fixed = getComputedStyle(e).position === 'fixed';
  if (e.getBoundingClientRect().right > innerWidth + 1 && !fixed) {
    let inside = e.parentElement, held = false;
    for (; inside; inside = inside.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(inside).overflowX)) held = true;
    if (!held) wide.push(e.tagName + '.' + e.className);
  }
}
return [document.scrollingElement.scrollWidth, wide.slice(0, 3)];
"""
_FORMULAS = """
return [...document.querySelectorAll('math')].map(m => {
  const box = m.getBoundingClientRect();
  return [box.width, box.height, m.textContent.includes('\\\\')];
});
"""
_DARK = """
const rgb = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
return (rgb[0] + rgb[1] + rgb[2]) / 3;
"""
_AXE = """
const done = arguments[0];
const rules = ['color-contrast', 'image-alt', 'svg-img-alt', 'role-img-alt'];
const shown = n => [n.target, n.any[0]?.message ?? n.failureSummary].join(': ');
axe.run(document, {runOnly: rules, resultTypes: ['violations']}).then(
  r => done(r.violations.flatMap(v => v.nodes.map(shown))), e => done(['' + e]));
"""


@functools.cache
def _axe():
    """The script of axe-core, which the extra `test` brings."""
    package = importlib.util.find_spec("axe_core_python")
    if package is None:
        raise FileNotFoundError("axe is not installed: pip install axe-core-python")
    return pathlib.Path(package.origin).with_name("axe.min.js").read_text(encoding="utf-8")


def _page(browser, address, name, shots):
    """Faults of one page: as it is in the light, in the dark, and on a phone."""
    faults = []
    for scheme, width in (("light", DESK), ("dark", DESK), ("light", PHONE), ("dark", PHONE)):
        if scheme == "dark" and width == PHONE and not shots:
            continue  # nothing depends on both
        browser.size(width)
        browser.prefer(scheme)
        browser.forget(address)
        browser.open(f"{address}/{name}")
        lightness = browser.run(_DARK)
        if (lightness < 100) != (scheme == "dark"):
            faults.append(f"{name}: the reader asked for {scheme}, and got lightness {lightness}.")
        across, wide = browser.run(_WIDE)
        if across > width + 1:
            faults.append(f"{name} scrolls sideways at {width} pixels: {across} wide; {wide}.")
        for w, h, raw in browser.run(_FORMULAS):
            if raw or w < 4 or h < 4:
                faults.append(f"{name} has a formula that is not laid out: {w}×{h}.")
        lost = browser.run(
            "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        faults += [f"{name} does not show the picture {source}." for source in lost]
        few = "return document.querySelectorAll('*').length < 4000"
        if width == DESK and browser.run(few):  # longer pages hold nothing else, and take minutes
            browser.run(_axe())
            found = browser.wait_for(_AXE)
            faults += [f"{name}, {scheme}: {text}" for text in found]
        if shots:
            place = f"{name.replace('/', '-').removesuffix('.html')}-{width}-{scheme}.png"
            browser.shot(shots / place)
    return faults


def _search(browser, start, name, shots=None):
    """Faults of the search of a page: what it finds, and where that leads."""
    faults = []
    browser.size(DESK)
    browser.prefer("light")
    for words in SOUGHT:
        browser.forget(start)
        browser.open(f"{start}/{name}")
        browser.write(".md-search__input", words)
        found = browser.until(
            "return [...document.querySelectorAll('.md-search-result__link')].map(a => a.href)"
        )
        if not found:
            faults.append(f"The search for {words!r} finds nothing from {start.split(':')[0]}.")
            continue
        if shots:
            browser.shot(shots / f"search-{words.split()[0]}.png")
        texts = browser.run("return document.querySelector('.md-search-result__list').innerText")
        if words.split()[0].lower() not in texts.lower():
            faults.append(f"The search for {words!r} shows other things: {texts[:80]!r}.")
    return faults


def _toggle(browser, address):
    """Faults of the switch between light and dark."""
    browser.size(DESK)
    browser.prefer("light")
    browser.forget(address)
    browser.open(f"{address}/index.html")
    before = browser.run(_DARK)
    for state in (1, 2):  # from the system's choice to the light, then to the dark
        browser.run(f"document.querySelector('label[for=__palette_{state}]').click()")
    browser.until(_DARK.replace("return", "return 100 >", 1))
    after = browser.run(_DARK)
    return [] if after < 100 < before else [f"The switch to the dark leaves {before} at {after}."]


def _versions(browser, address):
    shown = browser.until("return document.querySelector('.md-version__current')?.innerText")
    return [] if shown else ["The page does not show its version."]


def faults_of(folder, shots=None):
    """Everything that a reader would stumble over, in sentences."""
    folder = pathlib.Path(folder).resolve()
    faults = broken_links(folder)
    server, address = served(folder.parent)
    try:
        with Browser() as browser:
            start = f"{address}/{folder.name}"
            for name in PAGES:
                faults += _page(browser, start, name, shots)
            faults += _toggle(browser, start)
            faults += _versions(browser, start)
            faults += _search(browser, start, "index.html", shots)
            away = {url for url in browser.asked() if re.match(r"(https?|wss?):", url)}
            away = {url for url in away if not url.startswith(f"{address}/")}
            faults += [f"A page asks another host: {url}." for url in sorted(away)]
            faults += [f"A script complains: {text}" for text in browser.complaints()]
            faults += _search(browser, folder.as_uri(), "index.html")
    finally:
        server.shutdown()
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of one version: site/0.2")
    parser.add_argument("--screenshots", type=pathlib.Path, help="folder for pictures of pages")
    options = parser.parse_args()
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    began = os.times()
    faults = faults_of(options.folder, options.screenshots)
    for fault in faults:
        print(fault, file=sys.stderr)
    spent = os.times()
    seconds = sum(spent[:4]) - sum(began[:4])
    pages = len(list(pathlib.Path(options.folder).rglob("*.html")))
    print(f"{pages} pages, {len(PAGES)} of them opened: {len(faults)} faults, {seconds:.0f} CPU s.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
