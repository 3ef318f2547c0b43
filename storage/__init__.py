"""Activation stores on disk: format, writer, reader. Knows nothing of torch."""
