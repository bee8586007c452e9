"""Copy the model code into every model folder of hub_cards/, which then is a Hub repo as published.

A model folder is one with a config.json. Its *.py files at the top level are copies of modeling_edlm/*.py and nothing
else: those that differ are written, those that modeling_edlm no longer has are removed. Standard library only.
"""

import os
from pathlib import Path

HUB_CARDS = Path(__file__).resolve().parent
SOURCE = HUB_CARDS.parent / "modeling_edlm"
NOT_UPLOADED = {"__init__.py", "convert_checkpoint.py"}


def assemble(folder: Path, code: dict[str, bytes]) -> list[str]:
    """Bring the top-level *.py files of `folder` to `code` (name -> content) and return the names that changed."""
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
    for stale in folder.glob("*.py"):
        if stale.name not in code:
            stale.unlink(missing_ok=True)
            changed.append(stale.name)
    return changed


def main() -> None:
    code = {path.name: path.read_bytes() for path in sorted(SOURCE.glob("*.py")) if path.name not in NOT_UPLOADED}
    if not code:
        raise SystemExit(f"no model code in {SOURCE}")
    for config in sorted(HUB_CARDS.glob("*/config.json")):
        changed = assemble(config.parent, code)
        if changed:
            print(f"{config.parent.name}: {', '.join(changed)}")


if __name__ == "__main__":
    main()
