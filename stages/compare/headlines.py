"""Which values of a metric stand in a table that asks for no more, and which way is better.

A metric that is not here shows the value of its own name, or else its first, with the direction
that its result states for all of its values; it stands behind those that are here.
"""

# In the order of the tables of arXiv 2604.06495, then of what a reader looks for next.
HEADLINES: dict[str, tuple[str, ...]] = {
    # As papers print it, and the share it is made of beside it.
    "absorption": ("full_absorption_score", "full_absorption"),
    "explained_variance": ("explained_variance",),
    "sparse_probing": ("accuracy_k1", "accuracy_k2", "accuracy_k5"),
    "tpp": ("tpp_20",),
    "scr": ("scr_20",),
    "ood_probing": ("ood_auc", "ood_auc_without_malformed"),
    "shortcut_control": ("credited_auc",),
    "downstream": ("delta_ce", "loss_recovered_zero"),
    "probe_loss": ("probe_loss",),
    "ablation_sparsity": ("ablation_sparsity",),
    "l0": ("l0",),
    "dead_fraction": ("dead_fraction",),
    "gamma": ("gamma",),
    "density": ("density_p50",),
    "ito": ("ito_explained_variance", "ito_gain"),
}

_UP, _DOWN, _NONE = "up", "down", "none"

# Of values that differ from what their metric states for all of them.
DIRECTIONS: dict[tuple[str, str], str] = {
    ("ablation_sparsity", "effective_logits"): _DOWN,
    ("absorption", "full_absorption_score"): _UP,
    ("absorption", "absorption_fraction_score"): _UP,
    ("absorption", "probe_f1"): _NONE,
    ("absorption", "k1_f1"): _UP,
    ("absorption", "main_latents"): _NONE,
    ("absorption", "l1_steps"): _NONE,
    ("downstream", "delta_ce"): _DOWN,
    ("downstream", "kl"): _DOWN,
    ("downstream", "loss_recovered_zero"): _UP,
    ("downstream", "loss_recovered_mean"): _UP,
    ("ito", "ito_explained_variance"): _UP,
    ("ood_probing", "gap_to_oracle"): _DOWN,
    ("ood_probing", "drop"): _DOWN,
    ("ood_probing", "length_ood_auc"): _NONE,
    ("probe_loss", "probe_loss_constant"): _NONE,
    ("shortcut_control", "length_auc"): _NONE,
    ("shortcut_control", "group_auc"): _NONE,
    ("shortcut_control", "shuffled_auc"): _NONE,
    ("sparse_probing", "gap_to_oracle"): _DOWN,
}
