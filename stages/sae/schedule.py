"""What changes from step to step by plan: the learning rate and k."""


def lr_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    decay_start_step: int,
    restart_steps: int | None = None,
) -> float:
    """step / warmup (0 at step 0) up to 1, constant, then linearly to 0 at `steps`.

    restart_steps: the warm-up begins again after so many steps each (with resampling).
    """
    since = step % restart_steps if restart_steps else step
    if since < warmup_steps and (step < decay_start_step or not restart_steps):
        return since / warmup_steps
    if step >= steps:
        return 0.0
    if step >= decay_start_step:
        return (steps - step) / (steps - decay_start_step)
    return 1.0


def annealed_k(step: int, *, k: int, k_start: int, anneal_steps: int) -> int:
    """k after the update with that number: linearly from k_start to k."""
    share = min(step, anneal_steps) / anneal_steps
    return int(k_start * (1 - share) + k * share)
