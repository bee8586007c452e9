"""What mkdocs is told beyond mkdocs.yml.

Pages link to pictures and results of the repository by relative paths; `on_files` copies what they link to into the
site. So the same link works where the Markdown is read in the repository, and a link to a file that is not there stays
an error of `mkdocs build --strict`. `Sections` is for the API pages.
"""

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")  # a link of a page at the top of docs/
SECTION = re.compile(r"\n(Args|Returns|Yields|Raises|Attributes):\n")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.docs_dir).parent
    linked = {path for page in files.documentation_pages() for path in OUTSIDE.findall(page.content_string)}
    for path in sorted(linked):
        if (root / path).is_file() and not path.endswith(".md"):  # which would become a page
            source, included = str(root / path), InclusionLevel.INCLUDED
            file = File.generated(config, f"../{path}", abs_src_path=source, inclusion=included)
            file.dest_uri = path
            files.append(file)
    return files


class Sections(griffe.Extension):
    """Our docstrings leave no blank line between sections; griffe's parser wants one."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = SECTION.sub(r"\n\n\1:\n", obj.docstring.value)
