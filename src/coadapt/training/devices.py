"""Which of the ways to use several devices a run takes, as it was told or started; what of them it cannot take."""

from coadapt.training import processes
from coadapt.training.settings import RunConfig


def check(run: RunConfig) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: the run was started, or is set, in a way that does not work or was never tried.
    """
    if run.auto_find_batch_size and processes.count() > 1:
        raise ValueError(
            "auto_find_batch_size works in one process: of several, one that runs out of memory leaves the others "
            "waiting. Give per_device_train_batch_size."
        )
