"""Activation stores on disk: format, writer, reader. Knows nothing of torch."""

from .errors import DiskError, InputError, NetworkError, NonFiniteError, SaePipeError, StoreError
from .store import ActivationStore, open_store

__all__ = [
    "ActivationStore",
    "DiskError",
    "InputError",
    "NetworkError",
    "NonFiniteError",
    "SaePipeError",
    "StoreError",
    "open_store",
]
