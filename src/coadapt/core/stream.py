"""States of adapters beside the hidden states: they begin at the embedded input and go along from block to block.

Such a method stands at the entrance of a block, where the call is the identity: so the block runs once, whatever is
active, and writes to its cache once. The running states lie in the frame; what is checkpointed gets them as inputs and
gives them as outputs (see frame.Carried), so that its recomputation sees what its forward saw.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .around import Methods, NodeCall
from .backbone import Backbone
from .composition import Node
from .frame import Frame, SiteCall
from .gates import stream_site
from .input import embedded_input
from .layer import Layer
from .method import ModuleMethod
from .site import first_input


class Source(nn.Module):
    """What an adapter's state begins as; shared by all of its sites."""

    key: str
    """Marks its layers in the base's caches."""
    embeds_itself: bool
    """Whether it has an embedding of its own, and so needs the call's ids."""
    weight: float
    """Of its own loss, beside the task's: that of the head on what the state begins as."""

    @abstractmethod
    def begin(self, tokens: Tensor, call: Mapping[str, Any], cache: Any) -> tuple[Tensor, Any]:
        """The state, (B, T, D), and the cache that it goes on with, if the call has one.

        Args:
            tokens: (B, T, D) the embedded input, or (B, T) ids if it embeds itself.
            call: the other arguments of the stack.
        """


class StreamMethod(ModuleMethod):
    """At the entrance of a block: x is what the block is given, and so is `base(x)`."""

    widens = False

    @property
    @abstractmethod
    def source(self) -> Source: ...

    @abstractmethod
    def advanced(self, state: Tensor, y: Tensor) -> Tensor:
        """The state behind the block, (B, T, D), which gave y."""


class StreamCall(NodeCall):
    """What a plan has at a block: states change what that is given, and what it gives changes them."""

    def __init__(self, layer: Layer, nodes: Sequence[Node], methods: Methods, inner: SiteCall | None) -> None:
        super().__init__(layer, nodes, methods)
        self.inner = inner

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def below(*given: Any, **named: Any) -> Any:
            return forward(*given, **named) if self.inner is None else self.inner(frame, forward, given, named)

        x, call = first_input(below, args, kwargs)
        entrance = Layer(self.layer.module, self.layer.path, lambda z: z)
        entrance.site = stream_site(self.layer.path)
        out: Any = call(self.run(frame, x, entrance))
        y: Tensor = out[0] if isinstance(out, tuple) else out
        moved: dict[Any, Tensor] = {}
        for method in (m for found in self.methods.values() for m in found):
            assert isinstance(method, StreamMethod)
            if (state := frame.states.get(method.source)) is not None:
                moved[method.source] = method.advanced(state, y)
        frame.states = {**frame.states, **moved}
        return out


class SourceCall:
    """What a plan has at a stack: the states begin."""

    def __init__(self, place: Backbone, sources: Sequence[Source], inner: SiteCall | None) -> None:
        self.place, self.sources, self.inner = place, tuple(sources), inner
        self.embedded = embedded_input(place)
        self.names = [
            n for n in inspect.signature(place.module.forward).parameters if n not in ("self", "args", "kwargs")
        ]

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        mask, cache = call.get("attention_mask"), call.get("past_key_values")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"A network beside the model needs an attention mask of shape (batch, tokens); this call has {found}. "
                "Static caches make such masks: use the dynamic cache."
            )
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"A network beside the model keeps its own keys and values in the model's cache, and a "
                f"{type(cache).__name__} has no room for them: use the dynamic cache."
            )
        made: dict[Source, Any] = {}
        frame.states = {}
        for source in self.sources:
            state, grown = source.begin(self._tokens(frame, call, source), call, _cache_of(cache, source))
            frame.states[source], made[source] = state, grown
        frame.began = frame.states
        out = forward(**call) if self.inner is None else self.inner(frame, forward, (), call)
        frame.inputs.pop(self.embedded, None)  # where a model looks up ids itself, it is not taken out
        _remember(cache if (given := _cache_in(out)) is None else given, made)
        return out

    def _tokens(self, frame: Frame, call: Mapping[str, Any], source: Source) -> Tensor:
        """What a source reads. The model's own embedding runs once: it finds there what it gave."""
        ids: Tensor | None = call.get("input_ids")
        if source.embeds_itself:
            if ids is None or frame.kept is not None:
                raise ValueError(
                    "A network beside the model that has an embedding of its own (share_embeddings=False, or another "
                    "shadow_hidden_size) reads input_ids, without virtual tokens among them. Pass input_ids; beside a "
                    "prompt, use one that shares the model's embedding."
                )
            return ids
        ready = frame.inputs.get(self.embedded)
        if ready is None:
            ready = call.get("inputs_embeds")
        if ready is None:
            ready = frame.inputs[self.embedded] = self.place.embedding(ids)
        return ready


# ---- caches: layers of states lie behind those of the base, so that what moves its rows or tokens moves theirs too ---


def _cache_of(cache: Any, source: Source) -> Any:
    """The layers of `source` in the base's cache, as a cache; None at the beginning of a text.

    Raises:
        ValueError: the cache holds tokens that the source has not seen.
    """
    if cache is None or not (past := int(cache.get_seq_length())):
        return None
    from transformers import Cache

    own = [layer for layer in cache.layers if getattr(layer, "coadapt_source", None) == source.key]
    if not own or int(own[0].get_seq_length()) != past:
        raise ValueError(
            f"The cache holds {past} tokens that came without this adapter, whose own network has not seen them. Begin "
            "the text anew under the composition that goes on with it, or use use_cache=False."
        )
    return Cache(layers=own)


def _cache_in(out: Any) -> Any:
    if isinstance(out, dict):
        return out.get("past_key_values")
    return next((o for o in out if hasattr(o, "get_seq_length")), None) if isinstance(out, tuple) else None


def _remember(cache: Any, made: Mapping[Source, Any]) -> None:
    if cache is None:
        return
    for source, own in made.items():
        layers: list[Any] = [] if own is None else own.layers
        for layer in layers:
            layer.coadapt_source = source.key
        others = [layer for layer in cache.layers if getattr(layer, "coadapt_source", None) != source.key]
        cache.layers[:] = [*others, *layers]


def begun(frame: Frame, source: Source) -> Tensor | None:
    """(B, T, D) what the state of an adapter began as in this call, at its real tokens."""
    state: Tensor | None = frame.began.get(source)
    if state is None or frame.kept is None:
        return state
    return state.gather(1, frame.kept[..., None].expand(-1, -1, state.shape[-1]))
