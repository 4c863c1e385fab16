"""`view.base_model`, as the field has it."""

from collections.abc import Sequence
from typing import Any

from . import composition
from .view import View


class BaseModel:
    """What `view.base_model` is: the base's attributes, and the view's verbs where it has one of that name.

    Called, it is the base's body, adapted: the model without its head, as transformers' models name their `base_model`.
    """

    def __init__(self, view: View) -> None:
        self.__dict__["_view"] = view

    def __getattr__(self, name: str) -> Any:
        view: View = self.__dict__["_view"]
        return getattr(view if hasattr(type(view), name) else view.base, name)

    def __call__(
        self,
        *args: Any,
        adapters: Any = None,
        adapter_names: Sequence[Any] | None = None,
        task_ids: Any = None,
        **kw: Any,
    ) -> Any:
        """Hidden states; the whole of a model that has no body of its own.

        Raises:
            ValueError: an active adapter sits outside of the body, at the head: nothing here would use it.
        """
        view: Any = self.__dict__["_view"]
        base = view.base
        body = base.base_model if hasattr(base, "base_model_prefix") else base
        if body is base:
            return view(*args, adapters=adapters, adapter_names=adapter_names, task_ids=task_ids, **kw)
        inside = set(body.modules())
        asked = adapter_names or [view.composition if adapters is None else adapters]
        for name in {n for a in asked if a not in (None, "__base__") for n in composition.names(view.checked(a))}:
            out = [p.place.path for p in view.get_adapter(name).parts if p.place.module not in inside]
            if out:
                raise ValueError(
                    f"base_model gives hidden states, without the head; the adapter {name!r} at {out[0]!r} would have "
                    "no part in them, nor in what reads the head's weight itself. Call the view, or leave the head out."
                )
        with view.running(adapters, adapter_names, args, kw, task_ids):
            return body(*args, **kw)

    def __repr__(self) -> str:
        return repr(self.__dict__["_view"].base)
