"""A griffe extension: doctests of docstrings become code, their other lines stay as they are."""

import re

import griffe

# From a prompt to the next blank line.
_DOCTEST = re.compile(r"^([ ]*)>>> .*(?:\n(?![ ]*$).*)*", re.M)


def fenced(text):
    """A docstring with every doctest in a fence.

    >>> print(fenced("Sum.\\n\\n>>> 1 + 1\\n2\\n\\nEnd."))
    Sum.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    End.
    """

    def fence(found):
        return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"

    text = re.sub(r"^( *)Example:$", r"\1**Example**", text, flags=re.M)
    text = re.sub(r"^( *)Reference: ", r"\1**Reference** ", text, flags=re.M)
    # Two doctests with a blank line between them are two fences.
    return _DOCTEST.sub(fence, text)


class Doctests(griffe.Extension):
    """Fences the doctests of every object that is loaded, and finds inherited constructors."""

    def on_instance(self, *, obj, **unused):
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_package(self, *, pkg, **unused):
        """A class without a constructor of its own shows that of its nearest base."""
        for found in _classes(pkg):
            if "__init__" in found.members:
                continue
            for base in found.mro():
                if "__init__" in base.members:
                    found.set_member("__init__", base.members["__init__"])
                    break


def _classes(holder):
    for member in list(holder.members.values()):
        if not member.is_alias and (member.is_class or member.is_module):
            if member.is_class:
                yield member
            yield from _classes(member)
