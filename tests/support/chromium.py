"""The browser of the tests: the machine's Chromium, else one that this installs.

    python tests/support/chromium.py

looks for one, else installs Debian's where this user may, else takes Playwright's own download, and prints its path.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ADVICE = "the browser tests need a Chromium: install one (apt-get install chromium) or set CHROMIUM to its path"


def find() -> str | None:
    """Path of a Chromium: CHROMIUM, one on the PATH, or Playwright's."""
    if named := os.environ.get("CHROMIUM"):
        return named
    for name in NAMES:
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def install() -> None:
    """Try both ways; what they print is shown."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-q"], stdout=sys.stderr)
        subprocess.run(["apt-get", "install", "-qy", "--no-install-recommends", "chromium"], stdout=sys.stderr)
    if find() is None:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], stdout=sys.stderr)


if __name__ == "__main__":
    if find() is None:
        install()
    if (path := find()) is None:
        sys.exit(f"none was found, and none could be installed: {ADVICE}")
    print(path)
