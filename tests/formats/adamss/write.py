"""Writes adamss.safetensors beside it, with the field's library and scikit-learn. From the root of the project:

pip install --target /tmp/grouping --no-deps -c constraints.txt scikit-learn scipy joblib threadpoolctl narwhals
PYTHONPATH=src:tests:/tmp/grouping python -W ignore tests/formats/adamss/write.py
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from formats.field import field_gradients, field_logits, field_quietly, field_stirred, other, squared

WRITTEN = {
    "llama": other("llama", "AdamssConfig", r=8, num_subspaces=3, layers_to_transform=[1]),
    "bert": other("bert", "AdamssConfig", r=8, random_seed=2, layers_to_transform=[1]),  # with biases
}


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, str] = {}
    for name, case in WRITTEN.items():
        model = field_stirred(case)
        logits = field_logits(model)
        squared(logits).backward()
        with tempfile.TemporaryDirectory() as folder:
            field_quietly(lambda m=model, to=folder: m.save_pretrained(to))
            said[name] = (Path(folder) / "adapter_config.json").read_text()
            found = {f"{name}/{key}": t for key, t in load_file(Path(folder) / "adapter_model.safetensors").items()}
        found |= {f"{name}//gradient/{key}": t for key, t in field_gradients(model).items()}
        found[f"{name}//logits"] = logits.detach()
        for path, layer in model.base_model.model.named_modules():
            if hasattr(layer, "seg_result"):
                groups = layer.seg_result["default"]
                of = torch.empty(sum(map(len, groups.values())), dtype=torch.uint8)
                for number, rows in groups.items():
                    of[rows] = number
                found[f"{name}//groups/{path}"] = of
        tensors |= {key: t.contiguous().clone() for key, t in found.items()}
    save_file(tensors, Path(__file__).parent / "adamss.safetensors", said)


if __name__ == "__main__":
    main()
