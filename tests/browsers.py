"""The browser of this machine: Debian's chromium, or any of the names below; None where there is none."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
