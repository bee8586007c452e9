"""Files that are whole or not there, results read again, and what machine they are of. Plain Python: no torch here."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def write_whole(path: Path, content: str | Callable[[Path], None]) -> None:
    """A text, or what a function writes, under a temporary name that is renamed when the file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, results: dict) -> None:
    write_whole(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def replaced_folder(folder: Path):
    """Write a folder under a temporary name; it replaces the old one when whole."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_results(from_json: str) -> dict:
    try:
        return json.loads(Path(from_json).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"from_json must be a file of results, got {from_json!r}: {error}") from None


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def machine() -> dict:
    """What a speed depends on besides the options; `git_commit` is None outside a repository."""
    import torch  # takes seconds, and cards read results without it

    cpuinfo, root = Path("/proc/cpuinfo"), Path(__file__).resolve().parents[2]
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    commit = None
    if (root / ".git").exists() and shutil.which("git"):  # "-dirty" is added where tracked files differ from it
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, cwd=root, capture_output=True, text=True).stdout.strip() or None
    return {
        "cpu_name": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "git_commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
