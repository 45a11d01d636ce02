# SPDX-License-Identifier: BSD-3-Clause
"""Links out of the pages, as MkDocs builds them: to files of the repository, and from files at its root.

A page may link to ``../../tests/test_layer.py``, as it stands in a clone. The site links to the repository there, where
its address is known (``repo_url``), and shows the words without a link where it is not.
"""

import posixpath
import re
from pathlib import Path

INCLUDED = re.compile(r'^--8<-- "(\w+\.md)"$', re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s#]+)((?:#[^)\s]*)?)\)")
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown, page, config, **_):
    """Puts files of the root in the place of their names, and rewrites links that leave the pages."""
    root = Path(config["config_file_path"]).resolve().parent
    docs = Path(config["docs_dir"]).relative_to(root).as_posix()
    folder = posixpath.join(docs, posixpath.dirname(page.file.src_uri))

    def rewritten(text, where):
        def link(match):
            picture, words, target, anchor = match.groups()
            path = posixpath.normpath(posixpath.join(where, target))
            if re.match(r"\w+:", target) or (where == folder and path.startswith(f"{docs}/")):
                return match[0]
            if path.startswith(f"{docs}/"):
                return f"{picture}[{words}]({posixpath.relpath(path, folder)}{anchor})"
            if not (root / path).exists():
                return match[0]  # MkDocs warns of it
            url = (config["repo_url"] or "").rstrip("/")
            return f"[{words}]({url}/blob/HEAD/{path}{anchor})" if url else words

        return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in FENCED.split(text))

    whole = INCLUDED.sub(lambda match: rewritten((root / match[1]).read_text(encoding="utf-8"), "."), markdown)
    return rewritten(whole, folder)
