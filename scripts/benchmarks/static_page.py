"""Measure the page that paints in the browser: ``python scripts/benchmarks/static_page.py FOLDER``.

FOLDER is what ``gobelin page --out FOLDER`` wrote of the model that ships. It is served from this machine and opened in
Debian's Chromium without a window: its size, the seconds to the first step and to the first picture, from an empty
cache, those of the pictures after it, the processor time of all of the browser's processes, and how far pictures are
from Python's. With ``--threads`` there is a service worker, and so the threads that it brings; without, one thread.
"""

import argparse
import base64
import io
import os
import shutil
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Error, Page, sync_playwright

import gobelin

PROMPTS = ("a red circle to the left of a blue star", "three green rings", "a yellow star above a purple ring")


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    """Measure, and print a line for each picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", action="store_true")
    options = parser.parse_args()
    size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
    print(f"{size / 1e6:.1f} MB")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(options.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe = gobelin.Pipeline.from_pretrained(device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        if not options.threads:
            context.add_init_script("delete Navigator.prototype.serviceWorker;")
        tab = context.new_page()
        tab.wait_for_timeout(2000)  # the browser's own start
        seconds, work = time.perf_counter(), _processor_time(profile)
        tab.goto(f"http://127.0.0.1:{server.server_port}/#prompt={PROMPTS[0]}&seed=0")
        _wait(tab, "Step 1")
        print(f"to the first step {time.perf_counter() - seconds:.2f} s")
        for number, prompt in enumerate(PROMPTS):
            if number:
                seconds, work = time.perf_counter(), _processor_time(profile)
                tab.evaluate("document.querySelector('#status').textContent = ''")
                tab.get_by_label("Prompt").fill(prompt)
                tab.get_by_label("Prompt").press("Enter")
            _wait(tab, "Painted")
            seconds, work = time.perf_counter() - seconds, _processor_time(profile) - work
            url = tab.locator("word-map").evaluate("(element) => element.data.image")
            ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"), dtype=int)
            theirs = np.asarray(pipe(prompt, seed=0, weights="none").images[0], dtype=int)
            print(
                f"picture {number + 1}: {seconds:.2f} s, processor time {work:.2f} s; the greatest difference from "
                f"Python's is {np.abs(ours - theirs).max()} of 255"
            )
        print(tab.locator("#facts").inner_text(), f"Load of the machine: {os.getloadavg()[0]:.1f}")
        context.close()


def _wait(tab: Page, beginning: str) -> None:
    """Wait until the status begins so; the page may load again meanwhile."""
    while True:
        try:
            if tab.evaluate("document.querySelector('#status')?.textContent ?? ''").startswith(beginning):
                return
        except Error:
            pass
        time.sleep(0.02)


def _processor_time(profile: str) -> float:
    """Add up the processor time, in seconds, of the processes that were begun with this profile."""
    ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if profile.encode() in (folder / "cmdline").read_bytes():
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                ticks += int(fields[11]) + int(fields[12])
        except OSError:  # a process that ended
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
