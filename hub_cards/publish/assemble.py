"""Copy code into every model and metric folder of hub_cards/, which then is a Hub repo as published.

A model folder is one with a config.json. Its *.py files at the top level are copies of modeling_edlm/*.py and nothing
else: those that differ are written, those that modeling_edlm no longer has are removed. So are those of its
custom_generate/, which has generate.py and, because the library looks for them there, all the files that it imports. A
folder of metrics/ gets training/common/metrics.py and the page of every metric beside its own module. Standard library
only.
"""

import os
import re
from pathlib import Path

HUB_CARDS = Path(__file__).resolve().parents[1]
SOURCE = HUB_CARDS.parent / "modeling_edlm"
APP = Path(__file__).resolve().parent / "templates" / "metric_app.py"
METRICS = HUB_CARDS.parent / "training" / "common" / "metrics.py"
GENERATE = "custom_generate.py"  # custom_generate/generate.py of a model folder
NOT_UPLOADED = {"__init__.py", "convert_checkpoint.py", GENERATE}  # at the top level


def model_code() -> dict[str, bytes]:
    """The *.py files at the top level of a model folder."""
    return {path.name: path.read_bytes() for path in sorted(SOURCE.glob("*.py")) if path.name not in NOT_UPLOADED}


def generate_code() -> dict[str, bytes]:
    """The *.py files of its custom_generate/."""
    code, missing = {}, {GENERATE}
    while missing:
        name = missing.pop()
        code[name] = (SOURCE / name).read_bytes()
        imports = re.findall(r"^\s*from \.(\w+) import", code[name].decode(), re.MULTILINE)
        missing |= {f"{module}.py" for module in imports} - code.keys()
    return {"generate.py" if name == GENERATE else name: content for name, content in sorted(code.items())}


def metric_code() -> dict[str, bytes]:
    """What the folder of a metric gets beside its own module."""
    return {METRICS.name: METRICS.read_bytes(), "app.py": APP.read_bytes()}


def assemble(folder: Path, code: dict[str, bytes]) -> list[str]:
    """Bring the top-level *.py files of `folder` to `code` (name -> content) and return the names that changed."""
    folder.mkdir(exist_ok=True)
    changed = copy(folder, code)
    for stale in folder.glob("*.py"):
        if stale.name not in code:
            stale.unlink(missing_ok=True)
            changed.append(stale.name)
    return changed


def copy(folder: Path, code: dict[str, bytes]) -> list[str]:
    """Write the files of `code` that `folder` lacks or has otherwise, and return their names."""
    changed = []
    for name, content in code.items():
        target = folder / name
        if target.is_file() and target.read_bytes() == content:
            continue
        # Written aside and renamed: a process that loads the folder meanwhile sees the old file or the new one.
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, target)
        changed.append(name)
    return changed


def main() -> None:
    code = model_code()
    if not code:
        raise SystemExit(f"no model code in {SOURCE}")
    changes = {}
    for config in sorted(HUB_CARDS.glob("*/config.json")):
        for folder, files in ((config.parent, code), (config.parent / "custom_generate", generate_code())):
            changes[folder] = assemble(folder, files)
    for card in sorted(HUB_CARDS.glob("metrics/*/README.md")):
        changes[card.parent] = copy(card.parent, metric_code())
    for folder, changed in changes.items():
        if changed:
            print(f"{folder.relative_to(HUB_CARDS)}: {', '.join(changed)}")


if __name__ == "__main__":
    main()
