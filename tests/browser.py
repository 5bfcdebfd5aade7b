"""Chromium without a window, driven over its debugging pipe: messages are JSON, each ended by a zero byte."""

import base64
import json
import os
import shutil
import subprocess
import tempfile

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars",
)  # fmt: skip
WIDER = """(() => { const wide = [];
for (const details of document.querySelectorAll('details')) details.open = true;
for (const element of document.querySelectorAll('body *')) { const box = element.getBoundingClientRect();
  if (box.width && (box.right > innerWidth + 0.5 || box.left < -0.5)) wide.push(element.tagName + ' ' + box.left + ' ' + box.right + ' ' + element.textContent.slice(0, 60)); }
if (document.documentElement.scrollWidth > innerWidth) wide.push('the page scrolls');
return wide; })()"""


TEXTS = """(() => { const faults = [];
for (const svg of document.querySelectorAll('svg')) { const outer = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim());
  const boxes = texts.map(text => text.getBoundingClientRect());
  boxes.forEach((a, i) => { const name = svg.ariaLabel + ': ' + texts[i].textContent;
    const size = parseFloat(getComputedStyle(texts[i]).fontSize) * outer.width / svg.viewBox.baseVal.width;
    if (size < 9) faults.push(name + ' is ' + size + ' pixels');
    if (a.left < outer.left - 1 || a.right > outer.right + 1 || a.top < outer.top - 1 || a.bottom > outer.bottom + 1) faults.push(name + ' is cut');
    boxes.slice(0, i).forEach((b, j) => { // a line's box is higher than its letters
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 5)
        faults.push(name + ' lies over ' + texts[j].textContent); }); }); }
return faults; })()"""


class Browser:
    """One page of a fresh profile; `events` is everything that Chromium reported of it."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(prefix="kascade_chromium_", ignore_cleanup_errors=True)
        from_us, self.to_chromium = os.pipe()
        self.from_chromium, to_us = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4, which the shell makes of ours.
        places = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        chromium = [shutil.which("chromium"), *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", places, *chromium],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(from_us, to_us),
        )
        os.close(from_us)
        os.close(to_us)
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """What Chromium answers to a command; events that come before are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session and not method.startswith("Target."):
            message["sessionId"] = self.session
        os.write(self.to_chromium, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        while b"\0" not in self.buffer:
            part = os.read(self.from_chromium, 1 << 16)
            assert part, "Chromium has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, scheme="light"):
        """Shows a file in a window of a width, and waits until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=f"file://{path}")
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression):
        """A JavaScript expression's value."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def too_wide(self):
        """The elements that reach out of the window, with every table unfolded."""
        return self.evaluate(WIDER)

    def unreadable(self):
        """The texts of plots that are small, cut, or lie over one another."""
        return self.evaluate(TEXTS)

    def printed(self):
        """The page on paper, a PDF."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def requested(self):
        """The addresses that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self):
        """Errors, and whatever a script said."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def screenshot(self, path):
        """The whole page as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        """Ends Chromium."""
        self.process.terminate()
        self.process.wait()
        os.close(self.to_chromium)
        os.close(self.from_chromium)
        self.profile.cleanup()
