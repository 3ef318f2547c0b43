"""What values are called in pictures, and which of them have one on top of the page."""

# Of these a picture stands in the page; of other values with a better direction it is folded away.
FOREMOST = (
    ("absorption", "full_absorption_score"),
    ("explained_variance", "explained_variance"),
    ("downstream", "delta_ce"),
    ("sparse_probing", "accuracy_k1"),
    ("tpp", "tpp_20"),
    ("scr", "scr_20"),
    ("ood_probing", "ood_auc"),
)
# Headlines of these stand in the table of the page; the table of all metrics is folded away.
FOREMOST_METRICS = (*(metric for metric, _ in FOREMOST), "l0")

_TITLES = {
    ("explained_variance", "explained_variance"): "explained variance",
    ("downstream", "delta_ce"): "delta CE (nats a token)",
    ("downstream", "loss_recovered_zero"): "loss recovered (zero ablation)",
    ("absorption", "full_absorption_score"): "full absorption score, 100 (1 - share)",
    ("absorption", "full_absorption"): "share of words fully absorbed",
    ("sparse_probing", "accuracy_k1"): "accuracy of 1-latent probes",
    ("sparse_probing", "accuracy_k2"): "accuracy of 2-latent probes",
    ("sparse_probing", "accuracy_k5"): "accuracy of 5-latent probes",
    ("ood_probing", "ood_auc"): "AUC out of distribution",
    ("ood_probing", "ood_auc_without_malformed"): "AUC out of distribution, sound sets",
    ("tpp", "tpp_20"): "targeted probe perturbation, 20 latents",
    ("scr", "scr_20"): "spurious correlation removal, 20 latents",
    ("fvu", "fvu"): "fraction of variance unexplained",
    ("mse", "mse"): "mean squared error",
    ("mse_per_token", "mse_per_token"): "squared error a token",
    ("dead_fraction", "dead_fraction"): "share of dead latents",
    ("cosine", "cosine"): "cosine similarity",
    ("l0", "l0"): "L0",
}


def title_of(metric: str, value: str) -> str:
    """A value in words."""
    own = value.replace("_", " ")
    return _TITLES.get(
        (metric, value), own if metric in value else f"{metric} {own}".replace("_", " ")
    )
