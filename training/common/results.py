"""Files that are whole or not there, results read again, and what machine they are of. Plain Python: no torch here."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory


def write_whole(path: Path, content: str | Callable[[Path], None]) -> None:
    """A text, or what a function writes, under a temporary name that is renamed when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_text(content, encoding="utf-8")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, results: dict) -> None:
    write_whole(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def added_files(folder: Path, replaced: Collection[str] = ()):
    """Write files into a folder of a temporary name; each then takes its place in `folder`, whose other files stay, but
    for those that match one of the patterns `replaced`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, suffix=".tmp") as temporary:
        yield Path(temporary)
        files = [file.relative_to(temporary) for file in sorted(Path(temporary).rglob("*")) if file.is_file()]
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / file, folder / file)
        for old in [file for pattern in replaced for file in folder.glob(pattern)]:
            if old.relative_to(folder) not in files:
                old.unlink()


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


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table whose first columns are text, and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_results(from_json: str) -> dict:
    try:
        return read_json(Path(from_json))
    except (OSError, ValueError) as error:
        raise ValueError(f"from_json must be a file of results, got {from_json!r}: {error}") from None


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file; none where there is no file. A line that a kill cut off is none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Store:
    """Rows by key, in a file that grows by a line each: what is there is not made again."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = {_key(line["key"]): line["row"] for line in read_lines(path)}
        lines = [{"key": json.loads(key), "row": row} for key, row in self.rows.items()]
        if lines:  # without a line that was cut off
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))

    def row(self, key, make: Callable[[], dict | list]):
        """The row of a key (anything that JSON can hold), from the file or else from `make`."""
        if _key(key) not in self.rows:
            self.rows[_key(key)] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "row": self.rows[_key(key)]}) + "\n")
        return self.rows[_key(key)]


def _key(key) -> str:
    return json.dumps(key, sort_keys=True)


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
