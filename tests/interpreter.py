"""Makes Triton's interpreter quick enough for a suite."""

import functools
import importlib.util
import os


class _Kept:
    """What the interpreter asks to undo its changes after a launch: they stay."""

    def restore(self):
        pass


def quicken():
    """Lets the interpreter change triton.language once for each function.

    By itself it does so at each launch and at each call of one function by another, and undoes it
    after a launch, which takes half of the time of a small kernel. Nothing in a process of tests
    that interpret needs triton.language as it was.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    change = getattr(interpreter, "_patch_lang", None)  # not of its public interface

    @functools.cache
    def once(fn):
        change(fn)
        return _Kept()

    if change is not None:
        interpreter._patch_lang = once
