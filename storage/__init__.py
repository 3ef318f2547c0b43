"""Activation stores on disk: format, writer, reader. Knows nothing of torch."""

from .catalogue import list_stores
from .errors import DiskError, InputError, NetworkError, NonFiniteError, SaePipeError, StoreError
from .listing import StoreEntry, StoreFilter
from .store import ActivationStore, open_store

__all__ = [
    "ActivationStore",
    "DiskError",
    "InputError",
    "NetworkError",
    "NonFiniteError",
    "SaePipeError",
    "StoreEntry",
    "StoreError",
    "StoreFilter",
    "list_stores",
    "open_store",
]
