"""Run a Space's app.py as on the Hub: nothing can be imported but its folder and what its requirements.txt brings.

python -P tests/support/space_alone.py FOLDER
"""

import re
import runpy
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement


def closure(lines: list[str]) -> set[str]:
    """The names of the distributions that are required, and of those that these require, and so on."""
    found, missing = set(), [Requirement(line) for line in lines if line.strip()]
    while missing:
        requirement = missing.pop()
        name = canonical(requirement.name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in found:
                continue
            try:
                needs = [Requirement(line) for line in requires(name) or ()]
            except PackageNotFoundError:  # for another platform
                continue
            found.add((name, extra))
            missing += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Only:
    """Finds modules as the path does, but none of other distributions than these: as if they were not installed."""

    def __init__(self, names: set[str]):
        owners = packages_distributions()
        self.refused = {module for module, of in owners.items() if not names & {canonical(name) for name in of}}
        self.refused |= {"modeling_edlm", "training", "tests"}

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.refused else PathFinder.find_spec(name, path, target)

    def invalidate_caches(self):
        PathFinder.invalidate_caches()

    def find_distributions(self, *args, **kwargs):
        return PathFinder.find_distributions(*args, **kwargs)


def main() -> None:
    folder = Path(sys.argv[1])
    names = closure((folder / "requirements.txt").read_text().splitlines())
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only(names)]
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / "app.py"), run_name="__main__")


if __name__ == "__main__":
    main()
