"""The Space as a process, alone in a folder of its own, for the tests and the load test."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPACE, MODEL, STORIES = ROOT / "spaces_app", ROOT / "hub_cards" / "edlm-wiki27", ROOT / "hub_cards" / "edlm-stories"


class Server:
    """url: of the page. pid: of the process. log: what it has printed so far."""

    def __init__(self, url: str, pid: int, log: Path):
        self.url, self.pid, self.log = url, pid, log

    def resident_mb(self) -> float:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[1]) / 1024


@contextmanager
def serve(folder: Path, source: Path = MODEL, **environment: str) -> Iterator[Server]:
    """Copy the Space and a model into a folder, start it there, and end it afterwards."""
    space, model = folder / "space", folder / source.name
    shutil.copytree(SPACE, space, ignore=shutil.ignore_patterns("__pycache__", "screenshots"))
    shutil.copytree(source, model, ignore=shutil.ignore_patterns("__pycache__"))
    own = {
        "EDLM_REPO": str(model),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "PYTHONUNBUFFERED": "1",
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "EDLM_ALLOWED")}
    log = folder / "log"
    command = [sys.executable, "-P", ROOT / "tests" / "support" / "space_alone.py", space]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=folder, env=inherited | own | environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            for line in process.stdout:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield Server(found[0], process.pid, log)
                    break
            else:
                raise RuntimeError(f"the Space did not start:\n{log.read_text()}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.close()
