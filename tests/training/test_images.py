"""Image classification from the command line: trained, asked, shown, merged; and what does not go together."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from byte_tokenizer import save_base
from coadapt import PeftModel
from coadapt.cli.group import run as call
from coadapt.hub.card import make_card
from coadapt.training.ask import answer_image
from coadapt.training.load import load
from coadapt.training.log import read_log
from coadapt.training.run import Outcome, train
from coadapt.training.settings import RunConfig
from pictures import paint, paint_folders, save_seeing_base


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing_base(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_folders(tmp_path_factory.mktemp("images"))


def rows_in(file: Path) -> list[Any]:
    return json.loads(file.read_text("utf-8"))["rows"]


def go(base: Path, data: Path, out: Path, console: Console | None = None, **settings: Any) -> Outcome:
    usual = {"learning_rate": 1e-2, "num_train_epochs": 4, "eval_split": 0.25, "use_cpu": True}
    run = RunConfig(model=str(base), data=str(data), output_dir=str(out), **{**usual, **settings})
    return train(run, console or Console(file=io.StringIO(), width=120))


def test_classes_of_images(seeing: Path, images: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    done = go(seeing, images, out, Console(file=text, width=200), method="lora", lora_dropout=0.1)
    accuracies = [line["eval/accuracy"] for line in read_log(out / "metrics.jsonl") if "eval/accuracy" in line]
    assert accuracies[-1] == 1.0
    shown = text.getvalue()
    assert all(word in shown for word in ("image + label", "blue, red", "image-classification", "steps/s"))
    assert "⟦red⟧" in shown or "⟦blue⟧" in shown
    assert "token" not in shown
    sites = {part.place.path.rpartition(".")[2] for part in done.view.get_adapter("default").parts}
    assert sites == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"}
    new = {color: out.parent / f"new-{color}.png" for color in ("red", "blue")}
    for color, file in new.items():
        paint(file, color, seed=99, size=(20, 9))
    ready = load(None, out, device=torch.device("cpu"))
    assert {color: answer_image(ready, file) for color, file in new.items()} == {"red": "red", "blue": "blue"}

    def said(*args: object) -> str:
        capsys.readouterr()
        assert call([str(arg) for arg in args]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    asked = ("--image", new["blue"], "--image", new["red"], "--use-cpu")
    assert said("generate", "--adapter", out, *asked) == "blue\nred\n"
    assert "vit.layers.*.attention.q_proj" in said("show", out)
    assert "--image …" in said("merge", "--adapter", out, "--out", out.parent / "merged", "--use-cpu")
    assert said("generate", "--model", out.parent / "merged", *asked) == "blue\nred\n"
    held_out = json.loads(said("eval", "--adapter", out, "--use-cpu", "--json"))
    assert held_out["results"][1]["scores"]["accuracy"]["mean"] == 1.0
    assert {row["wanted"] == row["found"]["default"]["answer"] for row in rows_in(out / "evaluation.json")} == {True}
    assert len(rows_in(out / "evaluation.json")) == held_out["data"]["rows"] > 2
    # as the card says
    card = make_card(out, base=str(seeing)).text
    assert f'AutoModelForImageClassification.from_pretrained("{seeing}", num_labels=2, ignore_mismatched' in card
    assert "--image image.png" in card
    base = AutoModelForImageClassification.from_pretrained(seeing, num_labels=2, ignore_mismatched_sizes=True)
    pixels = torch.rand(2, 3, 8, 8)
    done.view.eval()
    assert torch.equal(PeftModel.from_pretrained(base, out)(pixels).logits, done.view(pixels).logits)


def test_an_interrupted_run_on_images_is_resumed(seeing: Path, images: Path, tmp_path: Path) -> None:
    how = {"method": "prefix + lora", "save_steps": 2, "learning_rate": 1e-3, "r": 2, "eval_strategy": "no"}
    whole = go(seeing, images, tmp_path / "whole", max_steps=4, lr_scheduler_type="constant", **how)
    go(seeing, images, tmp_path / "parts", max_steps=2, lr_scheduler_type="constant", **how)
    parts = go(seeing, images, tmp_path / "parts", max_steps=4, lr_scheduler_type="constant", **how, resume=True)
    one, other = whole.view.state_dict(), parts.view.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_go_together_is_refused(
    seeing: Path, images: Path, rows: str, base: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="it is a llama, which takes no images"):
        go(Path(base), images, out, method="lora")
    with pytest.raises(ValueError, match="it is a vit, which takes images"):
        go(seeing, Path(rows), out, method="lora", task="causal-lm")
    with pytest.raises(ValueError, match="max_length=8 has no effect on images"):
        go(seeing, images, out, method="lora", max_length=8)
    with pytest.raises(ValueError, match="at an embedding of tokens, need one"):
        go(seeing, images, out, method="prompt")
    bare = tmp_path / "bare"
    save_seeing_base(bare)
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no image processor \(preprocessor_config\.json\)"):
        go(bare, images, out, method="lora")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(bare)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(bare)
    with pytest.raises(ValueError, match="'all-linear' finds none beside the head in ResNet"):
        go(bare, images, out, method="lora")
    assert not out.exists()
    done = go(bare, images, out, method="lora", target_modules=["convolution"], max_steps=2)
    assert {part.place.path.rpartition(".")[2] for part in done.view.get_adapter("default").parts} == {
        "convolution",
        "classifier",
    }
    image, capsys_err = images / "red" / "0.png", lambda: capsys.readouterr().err
    assert call(["generate", "--model", base, "--image", str(image), "--use-cpu"]) == 1
    assert "takes text, not images" in capsys_err()
    assert call(["generate", "--model", str(seeing), "--prompt", "a", "--use-cpu"]) == 1
    assert "takes images, not text" in capsys_err()
    assert call(["generate", "--model", base, "--image", str(image), "--prompt", "a"]) == 2
    assert "give one of them" in capsys_err()


def test_a_loaded_model_is_on_the_device_that_was_chosen(tmp_path: Path, rows: str) -> None:
    from coadapt.training.machine import best, chosen

    assert chosen(use_cpu=True) == torch.device("cpu")
    assert chosen(use_cpu=False) == best()
    base = save_base(tmp_path / "base")
    go(base, Path(rows), tmp_path / "out", method="prompt + lora", composition="prompt + 0.5*lora", max_steps=1)
    for device in (torch.device("meta"), torch.device("cpu")):
        for adapter in (None, tmp_path / "out"):
            ready = load(str(base), adapter, device=device)
            found = [*ready.model.parameters(), *ready.model.buffers()]
            assert len(found) > 20
            assert {tensor.device for tensor in found} == {device}
    assert {p.device.type for p in load(str(base), None).model.parameters()} == {best().type}
