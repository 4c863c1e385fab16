"""Which of the ways to use several devices a run takes, as it was set or started; what it cannot take is refused here.

Launchers say what they were asked for in environment variables (`accelerate launch --use_fsdp` and others).
"""

import os
from collections.abc import Sequence
from typing import Any

from coadapt.training import processes
from coadapt.training.settings import RunConfig

WHOLE_WEIGHTS = ("frod", "shadow")
"""Methods that read the base's weights outside of the calls in which these are whole on each process."""
_FSDP = "ACCELERATE_USE_FSDP"
_LAUNCHED: Sequence[tuple[str, str]] = (
    ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config (tensor, context or sequence parallelism)"),
)
"""What a launcher can ask for and is not had here."""
_OPTIONS: Sequence[tuple[str, str]] = (
    (
        "FSDP_OFFLOAD_PARAMS",
        "fsdp_offload_params keeps the parts on the processor, which was never tried: leave it out",
    ),
    ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing: use coadapt's --gradient-checkpointing instead"),
)
"""Of accelerate's FSDP."""


def settle(run: RunConfig) -> RunConfig:
    """The run with what its launcher was asked for, before anything is loaded.

    It is coadapt that shares out the base, and not accelerate: that does nothing about it on processors, without a
    word; elsewhere it would share out the adapters too, and load the base on the first process of a machine only.

    Raises:
        ValueError: the run was started, or is set, in a way that does not work or was never tried.
    """
    for variable, way in _LAUNCHED:
        if _said(variable):
            raise ValueError(
                f"{variable}={os.environ[variable]} asks for {way}, with which coadapt train was never tried. Start it "
                "with torchrun or accelerate launch without that; --fsdp shares out the base (docs/devices.md)."
            )
    if processes.count() > 1 and run.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size works in one process: of several, one that runs out of memory leaves the others "
            "waiting. Give per_device_train_batch_size."
        )
    if run.device_map:
        _check_spread(run)
    if not run.fsdp and not _said(_FSDP):
        return run
    _check_sharded(run, "fsdp" if run.fsdp else _FSDP)
    os.environ[_FSDP] = "false"
    return run.model_copy(update={"fsdp": True})


def _check_spread(run: RunConfig) -> None:
    if processes.count() > 1 or run.fsdp:
        raise ValueError(
            f"device_map={run.device_map!r} spreads the base over the devices of one process, and here are "
            f"{processes.count()}{' and fsdp' * run.fsdp}. Start one without fsdp, or leave device_map out: --fsdp "
            "shares out the base over processes."
        )
    if run.quantisation:
        how = next(name for name in run.quantisation if name.startswith("load_in"))
        raise ValueError(f"device_map with {how} was never tried. Leave one of them out.")


def refuse_all_on_disk(base: Any, run: RunConfig) -> None:
    """Raises ValueError where a device_map has left nothing of the base but on disk, which accelerate would move."""
    if list(getattr(base, "hf_device_map", {}).values()) == ["disk"]:
        raise ValueError(
            f"device_map={run.device_map!r} leaves all of the base on disk, as one. Name its parts (those of "
            f"{', '.join(name for name, _ in base.named_children())} and below), or give more max_memory."
        )


def _check_sharded(run: RunConfig, asked: str) -> None:
    version = os.environ.get("FSDP_VERSION", "2") if _said(_FSDP) else "2"
    if version != "2":
        raise ValueError(
            f"FSDP_VERSION={version}: coadapt train shares out the base by FSDP2 only. Say --fsdp_version 2 to "
            "accelerate launch (fsdp_version: 2 in its configuration)."
        )
    for variable, wrong in _OPTIONS:
        if _said(variable):
            raise ValueError(f"{variable}={os.environ[variable]}: {wrong}.")
    if processes.count() == 1:
        raise ValueError(
            f"{asked} shares out the base over several processes, and here is one. Start more: torchrun "
            "--nproc-per-node N --no-python coadapt train …, or leave it out."
        )
    if run.quantisation:
        how = next(name for name in run.quantisation if name.startswith("load_in"))
        raise ValueError(f"{asked} with {how}: a quantised base in parts was never tried. Leave one of them out.")
    if wrong := [f"{name} ({a.method})" for name, a in run.adapters.items() if a.method in WHOLE_WEIGHTS]:
        raise ValueError(
            f"{asked} with {', '.join(wrong)}: the method reads weights of the base outside of the calls in which they "
            "are whole. Leave fsdp out, or take another method."
        )


def _said(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
