"""The words of the project: README.md, for who arrives, and the pages of docs/, for who stays."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("**/*.md"))


def words() -> str:
    """The text of README.md and of all pages."""
    return "\n".join(path.read_text() for path in (README, *DOCS))
