"""What the measuring scripts share: options that are lists, files that are whole or not there, results read again,
and what machine they are of.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

PUBLIC_DATA = Path("data")  # where a recorded command looks for a data set, wherever it was when it ran


class CommaLists:
    """For a dataclass of arguments with options such as "1,2,4"."""

    def listed(self, name: str, kind: type = str, distinct: bool = True) -> list:
        """The (different) values of a comma list, in order; ValueError names the option where one is no `kind`."""
        try:
            values = [kind(part.strip()) for part in str(getattr(self, name)).split(",") if part.strip()]
            return list(dict.fromkeys(values)) if distinct else values
        except ValueError:
            raise ValueError(f"{name} must be numbers with commas between, got {getattr(self, name)!r}") from None


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


def read_results(from_json: str) -> dict:
    try:
        return json.loads(Path(from_json).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"from_json must be a file of results, got {from_json!r}: {error}") from None


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def command(script: str, arguments, leave_out: Collection[str] = ()) -> str:
    """The command line of `training.<script>`, or of a module with a dot in its name, that gives these arguments (a
    dataclass, or its class and a dictionary).

    Defaults and what is in `leave_out` are not in it; data are where a card says that they are.
    """
    kind, values = arguments if isinstance(arguments, tuple) else (type(arguments), vars(arguments))
    fields = kind.__dataclass_fields__
    changed = {k: v for k, v in values.items() if k in fields and k not in leave_out and v != fields[k].default}
    for name in {"data", "validation_data"} & changed.keys():
        if Path(changed[name]).exists():
            changed[name] = PUBLIC_DATA / Path(changed[name]).name
    module = script if "." in script else f"training.{script}"
    return shlex.join(["python", "-m", module, *(str(x) for k, v in changed.items() for x in (f"--{k}", v))])


def machine() -> dict:
    """What a speed depends on besides the options; `git_commit` is None outside a repository."""
    cpuinfo, root = Path("/proc/cpuinfo"), Path(__file__).resolve().parent.parent
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
