"""What a machine has, and what of it works: found out by doing it, on tensors of a few kilobytes."""

import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from coadapt.training.units import GIB
from coadapt.versions import OPTIONAL, Finding, State, found

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels of PyTorch's own attention, which transformers calls sdpa."""
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

PICK = "pick the build for this machine at https://pytorch.org/get-started/locally"


def best() -> torch.device:
    """The device that a training would take."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def chosen(use_cpu: bool) -> torch.device:
    """The processor where that is asked for, else the best that there is."""
    return torch.device("cpu") if use_cpu else best()


def on_cpu(use_cpu: bool) -> bool:
    """Whether that is the processor, asked for or not."""
    return chosen(use_cpu).type == "cpu"


# ---- devices ---------------------------------------------------------------------------------------------------------


def devices() -> Iterator[Finding]:
    """Processor and memory, and each accelerator with its name, its memory, and whether it computes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    said = f"{cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory free"
    yield Finding(part="devices", name="cpu", state="ok", said=f"{platform.machine()}, {said}")
    kind = best().type
    if kind == "cpu":
        yield from _trouble()
        return
    for index in range(torch.accelerator.device_count()):
        yield _accelerator(torch.device(kind, index))


def _accelerator(device: torch.device) -> Finding:
    name = ("rocm" if torch.version.hip else device.type) + f":{device.index}"
    try:
        told = _told(device)
        square = torch.eye(8, device=device)
        if not (square @ square).equal(square):
            raise RuntimeError("a product of two identity matrices is none")
    except (RuntimeError, AssertionError) as error:
        said = f"it is there, but does not compute: {first_line(error)}"
        return Finding(part="devices", name=name, state="broken", said=said, mend=f"update its driver, or {PICK}")
    return Finding(part="devices", name=name, state="ok", said=told)


def _told(device: torch.device) -> str:
    if device.type not in ("cuda", "xpu"):
        return "shares the memory of the processor"
    module = getattr(torch, device.type)
    properties = module.get_device_properties(device)
    free, total = module.mem_get_info(device)
    more = ""
    if device.type == "cuda":
        version = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        more = f", compute capability {properties.major}.{properties.minor}, torch built for {version}"
    return f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free{more}"


def _trouble() -> Iterator[Finding]:
    """An accelerator that is there but that torch does not see."""
    there = {
        "cuda": shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists(),
        "rocm": shutil.which("rocm-smi") or Path("/dev/kfd").exists(),
    }
    built = {"cuda": torch.version.cuda is not None, "rocm": torch.version.hip is not None}
    for name in (name for name, driver in there.items() if driver):
        if not built[name]:
            said = f"this machine has the driver, but torch {torch.__version__} is built without {name.upper()}"
            yield Finding(part="devices", name=name, state="warning", said=said, mend=PICK)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.cuda.init()
            said = "torch sees no device (CUDA_VISIBLE_DEVICES=" + os.environ.get("CUDA_VISIBLE_DEVICES", "") + ")"
        except (RuntimeError, AssertionError, Warning) as error:
            said = f"torch cannot use it: {first_line(error)}"
        yield Finding(part="devices", name=name, state="warning", said=said, mend=f"update its driver, or {PICK}")


# ---- precision and attention -----------------------------------------------------------------------------------------


def precision() -> Iterator[Finding]:
    """fp32, bf16 and fp16: a product and its backward in it, and under autocast to it."""
    device = best()
    yield _tried("precision", "fp32", lambda: _product(device, torch.float32), on=device, needed=True)
    for name, dtype in HALVES.items():
        yield _tried("precision", name, lambda dtype=dtype: _product(device, dtype), on=device)
        yield _tried("precision", f"{name} autocast", lambda dtype=dtype: _autocast(device, dtype), on=device)


def _product(device: torch.device, dtype: torch.dtype) -> str:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 16, generator=generator)
    y = x.to(device, dtype).requires_grad_()
    (y @ y).sum().backward()
    wanted = x.sum(1)[None, :] + x.sum(0)[:, None]  # d(sum of x x) / dx
    return _close(y.grad, wanted) + _emulated(device, dtype)


def _emulated(device: torch.device, dtype: torch.dtype) -> str:
    slow = (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return ", but only emulated, and slow" if slow else ""


def _autocast(device: torch.device, dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    wanted, layer.weight.grad = layer.weight.grad, None
    layer.to(device)
    with warnings.catch_warnings(), torch.autocast(device.type, dtype):
        warnings.simplefilter("error")  # what autocast says when it does nothing
        out = layer(x.to(device))
    if out.dtype != dtype:
        raise RuntimeError(f"autocast gives {out.dtype}")
    out.float().sum().backward()
    return _close(layer.weight.grad, wanted)


def _close(found: Tensor | None, wanted: Tensor) -> str:
    assert found is not None
    error = ((found.cpu().float() - wanted).norm() / wanted.norm()).item()
    if not error < 0.05:
        raise RuntimeError(f"the gradient is off by {error:.0%}")
    return "forward and backward work"


def attention() -> Iterator[Finding]:
    """Each kernel of sdpa, forward and backward, in the precision that a training would take; and flash-attn."""
    device = best()
    dtype = torch.float32 if device.type in ("cpu", "mps") else torch.bfloat16
    yield _tried("attention", "sdpa", lambda: _attend(device, dtype, None), on=device, needed=True)
    for name, kernel in KERNELS.items():
        yield _tried("attention", f"sdpa {name}", lambda kernel=kernel: _attend(device, dtype, kernel), on=device)
    if found("flash-attn") is None:
        mend = OPTIONAL["flash-attn"] if device.type == "cuda" else None
        yield Finding(part="attention", name="flash-attn", state="absent", said="not installed", mend=mend)
    else:
        yield _tried("attention", "flash-attn", lambda: _flash(device), on=device)


def _attend(device: torch.device, dtype: torch.dtype, kernel: SDPBackend | None) -> str:
    q = torch.randn(1, 2, 16, 64, device=device, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a kernel cannot be taken: the error says that it cannot
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            try:
                out = scaled_dot_product_attention(q, q, q, is_causal=True)
            except RuntimeError as error:
                raise RuntimeError("PyTorch has no such kernel here") from error
        out.sum().backward()
    return "forward and backward work"


def _flash(device: torch.device) -> str:
    q = torch.randn(1, 16, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    import_module("flash_attn").flash_attn_func(q, q, q, causal=True).sum().backward()
    return "forward and backward work"


# ---- places ----------------------------------------------------------------------------------------------------------


def places() -> Iterator[Finding]:
    """Where models are kept, the free space there and here, and whether the hub is reached."""
    from huggingface_hub import constants  # read when it is asked for: the environment decides

    for name, place in (("hub cache", Path(constants.HF_HUB_CACHE)), ("this folder", Path.cwd())):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free / GIB
        writable = os.access(there, os.W_OK)
        state: State = "ok" if writable and free >= 1 else "warning"
        said = f"{place}, {free:.1f} GiB free" + ("" if writable else ", not writable")
        mend = "set HF_HOME to a folder with room" if name == "hub cache" else "free some space, or work elsewhere"
        yield Finding(part="places", name=name, state=state, said=said, mend=None if state == "ok" else mend)
    offline = constants.HF_HUB_OFFLINE
    said = (
        "HF_HUB_OFFLINE is set: only models that are here already" if offline else "not offline (HF_HUB_OFFLINE unset)"
    )
    yield Finding(part="places", name="hub", state="ok", said=said)


# ---- trying ----------------------------------------------------------------------------------------------------------


def _tried(part: str, name: str, try_it: Callable[[], str], *, on: torch.device, needed: bool = False) -> Finding:
    try:
        return Finding(part=part, name=name, state="ok", said=f"{try_it()} on {on.type}")
    except Exception as error:
        state: State = "broken" if needed else "absent"
        return Finding(part=part, name=name, state=state, said=f"does not work on {on.type}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """What an error says first: drivers write pages."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].partition(". ")[0][:200]
