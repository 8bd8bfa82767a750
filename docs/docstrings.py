"""A Griffe extension: the sections of this project's docstrings, as lists in Markdown.

Args                                        **Args**
    lr: learning rate, a float or        ->
        a tensor.                           - `lr`: learning rate, a float or a tensor.
"""

import re

import griffe

SECTIONS = "Args", "Returns", "Raises", "Errors", "Warnings"
ITEM = re.compile(r"([\w*.]+(?:, [\w*.]+)*|\"[^\"]+\"): (.*)")


class Sections(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text):
    made = []
    inside = False
    for line in re.sub(r"::$", ":", text, flags=re.MULTILINE).splitlines():
        indent = len(line) - len(line.lstrip())
        if line in SECTIONS:
            made += ["", f"**{line}**", ""]
            inside = True
        elif inside and line.strip() and indent == 0:  # after the last section
            made += ["", line]
            inside = False
        elif inside and indent == 4:
            item = ITEM.fullmatch(line.strip())
            made.append(f"- `{item[1]}`: {item[2]}" if item else line.strip())
        elif inside and line.strip():
            item = ITEM.fullmatch(line.strip())
            made.append(f"    - `{item[1]}`: {item[2]}" if item and item[1][0] == '"' else line)
        else:
            made.append(line)
    return "\n".join(made)
