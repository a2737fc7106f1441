"""An extension of Griffe: examples and formulas of docstrings, as Markdown writes them."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1.*\S.*)*", re.MULTILINE)
FORMULA = re.compile(r"^( *)\.\. math:: *(.*(?:\n\1 +\S.*)*)", re.MULTILINE)


def markdown(text: str) -> str:
    """Lines from `>>>` to the next empty one between fences, and formulas between dollars."""
    text = EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
    return FORMULA.sub(lambda found: f"{found[1]}$${' '.join(found[2].split())}$$", text)


class Markdown(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
