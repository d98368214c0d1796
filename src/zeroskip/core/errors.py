"""Every error zeroskip raises on purpose.  Each says what, what was given, what was expected, what to do."""

from __future__ import annotations


class ZeroskipError(Exception):
    """Base of all errors that are zeroskip's own."""


class Unsupported(ZeroskipError):
    """A method or a part of the library refuses a case; the text is the reason shown to the user."""


class CompileError(ZeroskipError):
    """Generated code did not assemble.  ``log`` holds the compiler's words."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.log = log


class FileFormatError(ZeroskipError, ValueError):
    """A ``.zsk`` file, plan or record cannot be read as what it claims to be."""


class SaveError(ZeroskipError):
    """An engine holds something that a ``.zsk`` file cannot carry; the message names it."""
