"""Formats of `sae-pipe store export`: EXPORTERS is the one list."""

from .arrow import ArrowExport
from .base import ACTIVATIONS, SOURCE, Exporter
from .npy import NpyExport
from .safetensors import SafetensorsExport

__all__ = ["ACTIVATIONS", "EXPORTERS", "SOURCE", "Exporter"]

EXPORTERS: dict[str, type[Exporter]] = {
    "numpy": NpyExport,
    "safetensors": SafetensorsExport,
    "arrow": ArrowExport,
}
