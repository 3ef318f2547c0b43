"""The former name of `shown`."""

from .shown import shown as printable

__all__ = ["printable"]
