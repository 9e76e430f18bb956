"""Links from a page to files outside docs/, which work in a repository, are plain text on the site."""

import re
from typing import Any


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace `[text](../path)` by `text`."""
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"`\1`", markdown)
