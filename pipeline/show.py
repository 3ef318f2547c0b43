"""Latents and stores as text for the terminal."""

from collections.abc import Sequence
from typing import Any

from ..stages.latents import Latent
from ..storage.shown import shown


def show_latents(latents: Sequence[Latent]) -> str:
    """Each latent with its top-activating tokens, marked in their context."""
    lines = []
    for latent in latents:
        lines.append(f"latent {latent.index}  fires on {latent.density:.3%} of the rows")
        for example in latent.examples:
            before = shown(example.before)[-48:].rjust(48)
            token, after = shown(example.token), shown(example.after)[:32]
            lines.append(f"  {example.activation:8.2f}  {before}[{token}]{after}")
        lines.append("")
    return "\n".join(lines).rstrip()


def show_pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    """Names and values, aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {shown(str(value))}" for name, value in pairs)
