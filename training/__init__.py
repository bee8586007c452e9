"""Training and evaluation scripts of EDLM, each run with `python -m training.<name>` in a clone of the repository."""

from importlib.util import find_spec

NEEDED = ("accelerate", "datasets", "matplotlib", "peft", "pyarrow", "tqdm", "yaml")

if missing := [name for name in NEEDED if find_spec(name) is None]:
    raise ModuleNotFoundError(f"training needs {', '.join(missing)}: pip install -e '.[train]' in the clone")
