"""A compiled view: torch.compile traces the base's call, and not how names become tensors, which happens around it."""

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch

_eval_frame: Any = torch._C._dynamo.eval_frame  # pyright: ignore
Function = TypeVar("Function", bound=Callable[..., Any])


def not_traced(function: Function) -> Function:
    """`function` runs as it is where it is the first thing that torch.compile would trace; what it calls is traced.

    As `torch.compiler.disable(recursive=False)`, without importing the compiler, and without breaking the graph of a
    compiled function that calls it.
    """
    code = function.__code__
    if hasattr(_eval_frame, "skip_code"):  # in earlier releases of PyTorch
        _eval_frame.skip_code(code)
    else:
        action = _eval_frame._FrameAction
        _eval_frame.set_code_exec_strategy(code, _eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT))
    return function


class untraced:
    """Context: nothing that is called is traced, but for what goes through `traced`."""

    def __enter__(self) -> Self:
        self.tracer = _eval_frame.set_eval_frame(None)
        return self

    def __exit__(self, *_: object) -> None:
        _eval_frame.set_eval_frame(self.tracer)

    @property
    def compiles(self) -> bool:
        return callable(self.tracer)

    def traced(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        _eval_frame.set_eval_frame(self.tracer)
        try:
            return _called(function, args, kwargs)
        finally:
            _eval_frame.set_eval_frame(None)


def _called(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What is traced starts here: torch.compile does not start in PyTorch's own code, as that of nn.Sequential."""
    return function(*args, **kwargs)


not_traced(untraced.__enter__)
not_traced(untraced.__exit__)
not_traced(untraced.traced)
