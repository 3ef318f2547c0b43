"""Sizes of Matryoshka's groups. Imports no torch: the command line checks them before anything."""

from collections.abc import Sequence

from ...storage.errors import InputError


def group_sizes(fractions: Sequence[float], d_sae: int) -> tuple[int, ...]:
    """Latents in each group: int(fraction * d_sae), the remainder in the last.

    Raises InputError when the fractions are not a division of d_sae latents.
    """
    listed = ", ".join(f"{fraction:g}" for fraction in fractions)
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(
            f"The group fractions ({listed}) must be positive and add up to 1, "
            f"not {sum(fractions):g}. Pass one share of the latents for each group."
        )
    sizes = [int(fraction * d_sae) for fraction in fractions[:-1]]
    sizes.append(d_sae - sum(sizes))
    if 0 in sizes:
        raise InputError(
            f"The group fractions ({listed}) leave group {sizes.index(0) + 1} without a latent "
            f"at --d-sae {d_sae}. Pass a larger --d-sae or fewer groups."
        )
    return tuple(sizes)
