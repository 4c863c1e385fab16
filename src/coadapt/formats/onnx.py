"""A model as ONNX, run by onnxruntime (extra `onnx`): one call without a cache, any batch and length."""

import inspect
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..versions import need

LARGEST = 2**31 - 2**20
"""Bytes of weights that go into the file itself; of more, they lie beside it."""


def check(base: Any) -> list[str]:
    """The names of the model's inputs. Raises ValueError where they cannot be told, or a package is missing."""
    need("ONNX files", "onnx", "onnxscript", "onnxruntime")
    takes = inspect.signature(base.forward).parameters
    config = getattr(base, "config", None)
    if config is None:
        raise ValueError(f"{type(base).__name__} is no model of transformers; export it with torch.onnx.export.")
    if "pixel_values" in takes and "input_ids" not in takes:
        return ["pixel_values"]
    if "input_ids" not in takes:
        raise ValueError(f"{type(base).__name__} takes neither input_ids nor pixel_values; ONNX is written of those.")
    return ["input_ids", "attention_mask", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]


class Plain(nn.Module):
    """A model as a function of tensors, without a cache. Positions count real tokens, wherever the padding is."""

    def __init__(self, base: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.base, self.names = base, list(names)
        takes = inspect.signature(base.forward).parameters
        self.places = "position_ids" in takes and base.can_generate() and not base.config.is_encoder_decoder
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        if self.places:
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return self.base(**given, **self.options, return_dict=True).logits


def write(base: Any, file: Path, inputs: Mapping[str, Tensor]) -> None:
    """Writes the model as it stands; batch and length (of tokens) stay free.

    Args:
        inputs: some, by name: two rows or more, of more than one token.

    Raises:
        ValueError: torch cannot write this model, and why.
    """
    model = Plain(base, list(inputs)).eval()
    free = [_free(name, value) for name, value in inputs.items()]
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    with _plain_attention(base), torch.no_grad(), _silent():
        try:
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(tuple(free),),
                input_names=list(inputs),
                output_names=["logits"],
                verbose=False,
            )
        except Exception as error:
            raise ValueError(
                f"torch {torch.__version__} cannot write {type(base).__name__} as ONNX: {_cause(error)}"
            ) from error
        assert program is not None
        _strip(program.model)
        program.save(file, external_data=size > LARGEST)


def _strip(model: Any) -> None:
    """Without the lines of source that each node came from, which are a third of a small file, and name local paths."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()) if graph is model.graph else graph.inputs:
            value.metadata_props.clear()
        graph.metadata_props.clear()


def _cause(error: BaseException) -> str:
    """What torch's exporter says last, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _free(name: str, value: Tensor) -> dict[int, Any]:
    batch = torch.export.Dim.DYNAMIC
    return {0: batch} if value.dim() != 2 else {0: batch, 1: torch.export.Dim.DYNAMIC}


@contextmanager
def _plain_attention(base: Any) -> Any:
    """Attention written out, whose masks can be traced for any length."""
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextmanager
def _silent() -> Any:
    """torch's exporter tells its steps, and that of its own parts are old."""
    log = logging.getLogger("torch.onnx")
    parts = [log, *(logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith("torch.onnx."))]
    before = [part.level for part in parts]
    for part in parts:
        part.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for part, level in zip(parts, before, strict=True):
            part.setLevel(level)


def session(file: Path) -> Any:
    """An onnxruntime session on the CPU, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run(opened: Any, inputs: Mapping[str, Tensor]) -> np.ndarray:
    """The logits."""
    return opened.run(["logits"], {name: value.cpu().numpy() for name, value in inputs.items()})[0]


def quantise(file: Path, out: Path) -> None:
    """Matrices as 8-bit numbers, with a scale for each column; what they multiply is made 8-bit in each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # it advises on the root logger
    try:
        quantize_dynamic(str(file), str(out), weight_type=QuantType.QInt8, per_channel=True)
    finally:
        root.setLevel(level)


def seconds(opened: Any, inputs: Mapping[str, Tensor], calls: int = 20) -> float:
    """Of one call: the least of several, since others may use this machine."""
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        run(opened, inputs)
        best = min(best, time.perf_counter() - start)
    return best
