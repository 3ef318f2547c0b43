"""The constraint of unit decoder rows: gradients stay in its tangent, rows return to it.

# D d_in, S d_sae

Without the constraint the reconstruction could shrink latents and grow rows at will.
"""

import torch
from torch import Tensor

from .support import row_dots


@torch.no_grad()
def project_gradient_(w_dec_SD: Tensor, epsilon: float) -> None:
    """Remove from the gradient of each row its component along the row / (norm + epsilon)."""
    gradient_SD = w_dec_SD.grad
    assert gradient_SD is not None
    all_S = torch.arange(len(w_dec_SD), device=w_dec_SD.device)
    along_S = row_dots(gradient_SD, all_S, w_dec_SD, all_S)
    along_S /= (torch.linalg.vector_norm(w_dec_SD, dim=1) + epsilon).square_()
    gradient_SD.addcmul_(along_S[:, None], w_dec_SD, value=-1)


@torch.no_grad()
def normalise_rows_(w_dec_SD: Tensor, epsilon: float) -> None:
    """Scale each row to unit norm; a row of zeros stays one, unless epsilon is 0.

    epsilon: as of the projection; anything but 0 stands for machine epsilon here.
    """
    added = torch.finfo(w_dec_SD.dtype).eps if epsilon else 0.0
    w_dec_SD.div_(torch.linalg.vector_norm(w_dec_SD, dim=1, keepdim=True) + added)
