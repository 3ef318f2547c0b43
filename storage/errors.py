"""Errors that a user can act on.

Each is one sentence that says what is wrong, what was found, and what to do next. The command line
prints it and exits with code 2; anything else that is raised is a bug of ours and keeps its
traceback.
"""


class SaePipeError(Exception):
    """Base of everything that a user can put right.

    is_shared: every process of a group raises it, so that the first of them alone tells it.
    """

    is_shared = False


class InputError(SaePipeError, ValueError):
    """An argument, a file or a combination of them that cannot work."""


class StoreError(SaePipeError):
    """A store that is missing, damaged, unfinished, or of another format version."""


class DiskError(SaePipeError, OSError):
    """Too little disk space, or a folder that cannot be written."""


class NetworkError(SaePipeError, ConnectionError):
    """Something had to be fetched and could not be."""


class NonFiniteError(SaePipeError, ArithmeticError):
    """NaN or Inf where a number must be."""
