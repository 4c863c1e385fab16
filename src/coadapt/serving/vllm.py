"""Handing over to vLLM: what it needs of each adapter, and the command."""

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coadapt.exporting import Exported, export
from coadapt.formats.facts import Contents, Facts, read_facts
from coadapt.formats.programs import PROGRAMS, VLLM_RANK, vllm_room
from coadapt.model import PeftModel
from coadapt.serving.opening import Given
from coadapt.training.load import base_of, load

PROGRAM = "vllm"
INSTALL = "pip install vllm"
KEY = "VLLM_API_KEY"
"""Where vLLM reads the key: on its command line others on the machine could read it."""
MOST = 32
"""Adapters in one batch, at most: vLLM sets the memory for all of them aside."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """One adapter as vLLM is given it."""

    name: str
    folder: Path
    room: int
    """The rank that it needs room for."""


def modules(given: Sequence[Given], model: str | None, told: Callable[[Exported], None], use_cpu: bool) -> list[Module]:
    """Each adapter as a folder that vLLM takes: its own, or one written beside it (`DIR-vllm`, as `export` does).

    Raises:
        ValueError: vLLM takes one in no way; lists all such, why, and what mends each. Nothing was written.
    """
    contents = {one.name: read_facts(one.folder) for one in given}
    if no := [line for one in given for line in _never(one, contents[one.name])]:
        raise ValueError("vLLM does not take all of these adapters:\n" + "\n".join(no))
    found = list[Module]()
    for one in given:
        room = _as_it_is(contents[one.name])
        if room is not None:
            found.append(Module(name=one.name, folder=contents[one.name].adapters[0].folder, room=room))
            continue
        done = _exported(one, model, use_cpu)
        told(done)
        ranks = [rank for facts in read_facts(done.out).adapters for rank in facts.ranks]
        room = vllm_room(read_facts(done.out).adapters[0])
        if room is None:
            raise ValueError(f"{done.out}, which was written for vLLM, has rank {max(ranks)}, more than it takes.")
        found.append(Module(name=one.name, folder=done.out, room=room))
    return found


def _as_it_is(contents: Contents) -> int | None:
    only = contents.adapters[0] if len(contents.adapters) == 1 else None
    return vllm_room(only) if only is not None and contents.composition == only.name else None


def _never(given: Given, contents: Contents) -> list[str]:
    """Why vLLM will never take it, and what to do instead; nothing where it does, or an export of it."""
    found = list[str]()
    for facts in contents.adapters:
        if vllm_room(facts) is None and not _becomes_lora(facts):
            verdict = next(p for p in PROGRAMS if p.name == "vLLM").judge(facts)
            mends = f"\n    {verdict.command}" if verdict.command else " Serve it with coadapt (without --engine vllm)."
            shown = given.name if len(contents.adapters) == 1 else f"{facts.name} of {given.name}"
            found.append(f"  {shown}: {'; '.join(verdict.reasons)}.{mends}")
    return found


def _becomes_lora(facts: Facts) -> bool:
    command = next(p for p in PROGRAMS if p.name == "vLLM").judge(facts).command or ""
    return command.startswith("coadapt export") and "--merged" not in command


def _exported(given: Given, model: str | None, use_cpu: bool) -> Exported:
    from coadapt.training.machine import chosen

    ready = load(model, given.folder, device=chosen(use_cpu))
    view = ready.model
    assert isinstance(view, PeftModel)
    where = given.folder.with_name(f"{given.folder.resolve().name}-vllm")
    return export(view, "vllm", where, tokenizer=ready.processor, overwrite=True, provenance=given.folder)


def base_of_all(model: str | None, given: Sequence[Given]) -> str:
    """The base. Raises ValueError where it is not told, and adapters name none or several."""
    if model is not None:
        return model
    named = {one.name: base_of(one.folder) for one in given}
    bases = sorted({base for base in named.values() if base})
    if len(bases) != 1:
        raise ValueError(f"Which base? Give --model (the adapters name {' and '.join(bases) or 'none'}).")
    return bases[0]


def command(base: str, adapters: Sequence[Module], options: Mapping[str, object]) -> list[str]:
    """The command that serves them; `options` as vLLM calls them, less those that are None."""
    line = [PROGRAM, "serve", base]
    line += [f"--{name}={value}" for name, value in options.items() if value is not None]
    if adapters:
        line += ["--enable-lora", f"--max-lora-rank={max(VLLM_RANK, *(module.room for module in adapters))}"]
        most = options.get("max-cpu-loras") or MOST  # of which those of one batch are a part
        line += [f"--max-loras={min(len(adapters), MOST, int(str(most)))}"]
        line += ["--lora-modules", *(f"{module.name}={module.folder.resolve()}" for module in adapters)]
    return line


def find(line: Sequence[str]) -> str:
    """The program. Raises ValueError where it is not installed, with what installs it and the command to type then."""
    if (found := shutil.which(PROGRAM)) is not None:
        return found
    raise ValueError(f"vLLM is not installed here. Install it ({INSTALL}), and run:\n{shlex.join(line)}")
