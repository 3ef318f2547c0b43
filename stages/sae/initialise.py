"""Where parameters start: decoder rows, and b_dec from the first batch.

# B rows, D d_in, S d_sae
"""

import torch
from torch import Tensor

from .asking import may_ask


def unit_rows(d_sae: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform rows (S, D) scaled to unit norm, in float32.

    Kaiming's bound only scales the draw, so normalising makes it irrelevant: what stays is the
    direction of a point drawn uniformly from a cube.
    """
    rows_SD = torch.rand(d_sae, d_in, generator=generator).mul_(2).sub_(1)
    return rows_SD.div_(rows_SD.norm(dim=1, keepdim=True))


def gaussian_rows(d_sae: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Rows (S, D) of unit norm in directions that are uniform on the sphere, in float32."""
    rows_SD = torch.randn(d_sae, d_in, generator=generator)
    return rows_SD.div_(rows_SD.norm(dim=1, keepdim=True))


@torch.no_grad()
def geometric_median(x_BD: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration.

    A row that is the guess itself would get infinite weight and turn everything into NaN; its
    distance is bounded from below instead.
    """
    guess_D, is_near = x_BD.mean(dim=0), torch.zeros((), dtype=torch.bool, device=x_BD.device)
    smallest = torch.finfo(x_BD.dtype).tiny ** 0.5
    for _ in range(max_iterations):
        weights_B = 1 / (x_BD - guess_D).norm(dim=1).clamp_min(smallest)
        weights_B /= weights_B.sum()
        previous_D, guess_D = guess_D, (weights_B[:, None] * x_BD).sum(dim=0)
        if may_ask(x_BD):
            if (guess_D - previous_D).norm() < tolerance:
                break
        else:  # what would have ended stays as it is
            guess_D = torch.where(is_near, previous_D, guess_D)
            is_near |= (guess_D - previous_D).norm() < tolerance
    return guess_D
