"""A model with some of its blocks several times, as `layer_replication` asks for it: the weights are shared.

The model itself stays as it is. What is made is a second structure around the very same tensors.
"""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import base_of

Map = Sequence[Sequence[int]]
"""[start, end) of the blocks that follow each other: [[0, 4], [2, 5]] makes 0 1 2 3 2 3 4 of five."""
_MARK = "_coadapt_replication"


def replication_of(base: nn.Module) -> Map | None:
    """How the blocks of a base are repeated; None where each is there once."""
    found: Map | None = vars(base).get(_MARK)
    return found


def replicated(model: Any, wanted: Map | None) -> nn.Module:
    """`model` itself where nothing is to be repeated, or is already so; otherwise a copy that shares all tensors.

    Raises:
        ValueError: the model's blocks are not found, are fewer, or wait elsewhere.
        RuntimeError: adapters are merged into the model.
    """
    if wanted is None or replication_of(model) is not None:
        return model
    path = blocks_of(model)
    count = len(model.get_submodule(path))
    order = [i for start, end in wanted for i in range(start, end)]
    if max(order) >= count:
        raise ValueError(
            f"layer_replication={_written(wanted)} names block {max(order)}; {path!r} of {type(model).__name__} has "
            f"{count}, counted from 0, and the end of a range is not part of it."
        )
    if base_of(model).merged_by is not None:
        raise RuntimeError("Another view has merged its adapters into this base; unmerge_adapter() there first.")
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(
            "layer_replication needs a model that accelerate does not move about; load it without device_map, or on "
            "one device."
        )
    tensors = {id(t): t for module in model.modules() for t in _tensors(module)}
    made = copy.deepcopy(model, dict(tensors))
    configs = {id(c): c for m in made.modules() if (c := vars(m).get("config")) is not None}
    blocks = made.get_submodule(path)
    new = nn.ModuleList(copy.deepcopy(blocks[i], {**tensors, **configs}) for i in order)
    for i, block in enumerate(new):
        module: Any
        for module in block.modules():
            if "layer_idx" in vars(module):  # where its keys and values lie in a cache
                module.layer_idx = i
    parent, _, name = path.rpartition(".")
    setattr(made.get_submodule(parent), name, new)
    _tell(made.config.get_text_config(), count, order)
    vars(made)[_MARK] = [list(part) for part in wanted]
    base_of(made).below = base_of(model)
    return made.train(model.training)


def check(base: nn.Module, wanted: Map | None) -> None:
    """Raises ValueError where an adapter is made for other repetitions than its view has."""
    if (there := replication_of(base)) == (None if wanted is None else [list(part) for part in wanted]):
        return
    raise ValueError(
        f"This LoRA is for layer_replication={_written(wanted)}, and the model that it is to be attached to has "
        f"{_written(there)}. All LoRAs of a view have the same; another needs a view of its own: "
        "get_peft_model(base, config), or PeftModel.from_pretrained(base, folder)."
    )


def separate(base: nn.Module) -> None:
    """Gives each block weights of its own, as files need it, and ends what ties the model to the one it is made of."""
    if replication_of(base) is None:
        return
    seen: set[int] = set()
    for block in base.get_submodule(blocks_of(base)).children():
        own = {id(p) for p in block.parameters()}
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in seen:
                    module.register_parameter(name, copy.deepcopy(parameter))
        seen |= own
    del vars(base)[_MARK]


def blocks_of(model: Any) -> str:
    """The path of the one list of blocks that a model is made of. Raises ValueError where there is none, or several."""
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", None) if hasattr(config, "get_text_config") else None
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1 or config.is_encoder_decoder:
        raise ValueError(
            f"layer_replication repeats the blocks of a model that is one stack of them; in {type(model).__name__} "
            f"{', '.join(map(repr, lists)) or 'no list'} would be it. Leave it out."
        )
    return lists[0]


def _tensors(module: nn.Module) -> list[Tensor]:
    """All that a module holds itself, as parameters, as buffers or beside them (quantised layers)."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [*held, *(v for v in vars(module).values() if isinstance(v, Tensor))]


def _tell(config: Any, count: int, order: Sequence[int]) -> None:
    """How many blocks there are, and of which kind each is."""
    config.num_hidden_layers = len(order)
    for name, said in list(vars(config).items()):
        if "layer" in name and isinstance(said, list) and len(said) == count:
            setattr(config, name, [said[i] for i in order])


def _written(wanted: Map | None) -> str:
    return "None" if wanted is None else str([list(part) for part in wanted])
