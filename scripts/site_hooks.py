"""Hooks of mkdocs (mkdocs.yml): files of the repository that pages link to are files of the site.

A page links to them as a checkout needs it, such as ``../configs/rpc.yaml``, which is outside of
the site; here they move to where the link, one step shorter, finds them.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\((?:\.\./)*)\.\./((?:configs|scripts)/[\w./-]+|CONTRIBUTING\.md)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    for page in list(files.documentation_pages()):
        for _, path in LINK.findall(page.content_string):
            if files.get_file_from_path(path) is None and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINK.sub(r"\1\2", markdown)
