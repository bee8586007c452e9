"""Copy code into every model and metric folder of hub_cards/, which then is a Hub repo as published.

A model folder is one with a config.json. Its *.py files at the top level are copies of modeling_edlm/*.py and nothing
else: those that differ are written, those that modeling_edlm no longer has are removed. A folder of metrics/ gets a
copy of training/metrics.py beside the files of its own. Standard library only.
"""

import os
from pathlib import Path

HUB_CARDS = Path(__file__).resolve().parent
SOURCE = HUB_CARDS.parent / "modeling_edlm"
METRICS = HUB_CARDS.parent / "training" / "metrics.py"
NOT_UPLOADED = {"__init__.py", "convert_checkpoint.py"}


def assemble(folder: Path, code: dict[str, bytes]) -> list[str]:
    """Bring the top-level *.py files of `folder` to `code` (name -> content) and return the names that changed."""
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
    code = {path.name: path.read_bytes() for path in sorted(SOURCE.glob("*.py")) if path.name not in NOT_UPLOADED}
    if not code:
        raise SystemExit(f"no model code in {SOURCE}")
    changes = {config.parent: assemble(config.parent, code) for config in sorted(HUB_CARDS.glob("*/config.json"))}
    for card in sorted(HUB_CARDS.glob("metrics/*/README.md")):
        changes[card.parent] = copy(card.parent, {METRICS.name: METRICS.read_bytes()})
    for folder, changed in changes.items():
        if changed:
            print(f"{folder.name}: {', '.join(changed)}")


if __name__ == "__main__":
    main()
