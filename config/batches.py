"""How the processes of a run share its global batch: what training asks and, before torch is there, the scripts."""

from __future__ import annotations

from config.explain import UserError
from config.schema import Config

MAX_BATCH = 256  # samples of one process at a time, where the configuration leaves it open


def plan_batches(cfg: Config, world_size: int) -> tuple[int, int]:
    """(samples of one process at a time, micro-batches of an optimizer step) for the recipe's global batch.

    Raises UserError where the global batch is not a multiple of processes x batch size.
    """
    global_batch, batch_size = cfg.optim.global_batch, cfg.data.batch_size
    if cfg.run.eval:  # nothing is added up to a global batch
        return batch_size or min(MAX_BATCH, max(1, global_batch // world_size)), 1
    if global_batch % world_size:
        raise UserError(f"The global batch of {global_batch} does not divide among {world_size} processes.")
    share = global_batch // world_size
    if batch_size is None:
        batch_size = next(b for b in range(min(share, MAX_BATCH), 0, -1) if share % b == 0)
    if share % batch_size:
        raise UserError(
            f"The global batch of {global_batch} is not a multiple of {world_size} process(es) x {batch_size} samples; "
            f"choose a --batch-size that divides {share}, or another --global-batch."
        )
    return batch_size, share // batch_size
