"""Chromium without a screen, driven over a pipe by its DevTools protocol, as a user drives it."""
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

CHROMIUM = (shutil.which("chromium") or shutil.which("chromium-browser")
            or shutil.which("google-chrome"))
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--force-color-profile=srgb", "--remote-debugging-pipe"]
PATIENCE = 60  # seconds


class Browser:
    """A Chromium with one page; messages are JSON, each ended by a zero byte."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()

        def take_pipes():  # Chromium reads from 3 and writes to 4
            ends = os.dup(read_there), os.dup(write_there)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"],
            preexec_fn=take_pipes, close_fds=False, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(read_there)
        os.close(write_there)
        self.reader, self.writer = read_here, write_here
        self.count, self.rest, self.session, self.events = 0, b"", None, []
        target, = [info for info in self.call("Target.getTargets")["targetInfos"]
                   if info["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"],
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.reader)
        os.close(self.writer)
        self.folder.cleanup()

    def call(self, method, **parameters):
        """The result of a method of the protocol; events that come meanwhile are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        deadline = time.time() + PATIENCE
        while time.time() < deadline:
            answer = self.receive(deadline)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)
        raise TimeoutError(method)

    def receive(self, deadline):
        """The next message."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.reader], [], [], max(0, deadline - time.time()))
            part = os.read(self.reader, 2 ** 20) if ready else b""
            if not part:
                raise TimeoutError("Chromium does not answer")
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    # ---------------------------------------------------------------- what a user does

    def open(self, path, state=""):
        """Opens a file, with the part of the address that follows #."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"file://{path}#{state}")
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression):
        """Waits until an expression is true. Raises TimeoutError."""
        deadline = time.time() + PATIENCE
        while not self.evaluate(expression):
            if time.time() > deadline:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def click(self, selector):
        """Clicks in the middle of an element."""
        x, y = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
            f"return [r.x + r.width / 2, r.y + r.height / 2] }})"
            f"(document.querySelector({json.dumps(selector)}))")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text):
        """Types a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key, code):
        """Presses a key, such as ("w", 87) or ("Tab", 9)."""
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text,
                  windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def texts(self, selector):
        """The visible texts of all elements of a selector."""
        return self.evaluate("[...document.querySelectorAll("
                             f"{json.dumps(selector)})].map(e => e.innerText)")

    def resize(self, width, height=800, scheme="light"):
        """Sets the window's size and the colours that the user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        """Writes what the window shows, as PNG."""
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
