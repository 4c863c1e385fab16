"""Model cards: what they say stands in the folder, their lines run, and a person's words stay."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from coadapt import LoraConfig, get_peft_model
from coadapt.cli.group import run
from coadapt.hub.card import BEGIN, END, Said, make_card, write_card
from coadapt.hub.figures import run_time
from coadapt.hub.licences import licence_of

OF_PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def lines_of(card: str, kind: str) -> list[str]:
    return [text for found, text in FENCED.findall(card) if found == kind]


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(("folder", "libraries"), [("one", ["coadapt", "peft"]), ("two", ["coadapt"])])
@pytest.mark.filterwarnings(OF_PEFT)
def test_its_lines_run(at_work: Path, capsys: pytest.CaptureFixture[str], folder: str, libraries: list[str]) -> None:
    card = (at_work / folder / "README.md").read_text("utf-8")
    scripts = lines_of(card, "python")
    assert [re.search(r"from (\w+) import PeftModel", text)[1] for text in scripts] == libraries  # type: ignore[index]
    said: list[str] = []
    capsys.readouterr()
    for text in scripts:
        exec(compile(text.replace("max_new_tokens=64", "max_new_tokens=8"), folder, "exec"), {})
        said.append(capsys.readouterr().out.strip())
    [command] = lines_of(card, "console")
    program, *args = shlex.split(command.removeprefix("$ "))
    assert (program, run([*args, "--max-new-tokens", "8", "--use-cpu"])) == ("coadapt", 0)
    assert {*said, capsys.readouterr().out.strip()} == {said[0]}  # the same answer, three ways
    assert said[0]


def test_it_says_what_the_folder_recorded(at_work: Path) -> None:
    card = make_card(at_work / "two", Said(license="mit", language="en"), repo="me/both", base="org/base").text
    metadata = front(card)
    assert {**metadata, "model-index": None} == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "coadapt",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "language": "en",
        "tags": ["lora", "prompt-tuning", "adapter", "coadapt"],
        "model-index": None,
    }
    measured = json.loads((at_work / "two" / "evaluation.json").read_text("utf-8"))
    both = next(one for one in measured["results"] if one["composition"] == "prompt + lora")["scores"]
    [result] = ModelCard(card).data.eval_results[:1]
    assert (result.metric_type, result.metric_value) == ("exact_match", round(both["exact_match"]["mean"], 6))
    base = measured["results"][0]["scores"]["perplexity"]
    assert f"{base['mean']:,.0f} ({base['low']:,.0f} to {base['high']:,.0f})" in card
    told = json.loads((at_work / "two" / "provenance.json").read_text("utf-8"))
    for fact in (told["data"]["sha256"], told["versions"]["torch"], "133,632 parameters", "![The loss over the steps]"):
        assert fact in card
    assert "| licence of the data | **unknown** |" in card
    settings = yaml.safe_load(lines_of(card, "yaml")[0])
    assert (settings["data"], settings["max_steps"], [*settings["adapters"]]) == ("rows.jsonl", 4, ["prompt", "lora"])


def test_what_was_not_measured_is_not_claimed(at_work: Path) -> None:
    card = (at_work / "one" / "README.md").read_text("utf-8")
    assert "## Scores\n\nNot measured." in card
    assert "model-index" not in front(card)
    assert front(card)["library_name"] == "peft"


def test_nothing_of_the_person_is_in_it(at_work: Path) -> None:
    """Neither where the work stands, nor who did it, nor a row of the data."""
    rows = [json.loads(line) for line in (at_work / "data" / "rows.jsonl").read_text("utf-8").splitlines()]
    for folder in ("one", "two"):
        card = write_card(at_work / folder, repo="me/it", base="org/base").text
        assert "somebody-at-work" not in card
        assert str(at_work) not in card
        assert not re.search(r"(?<![\w.:/])/(home|tmp|root|Users|work)\b", card)
        assert not any(line in card for row in rows for line in row["prompt"].splitlines() if len(line) > 8)


def test_a_persons_words_stay(at_work: Path) -> None:
    file = at_work / "one" / "README.md"
    text = file.read_text("utf-8").replace("*Not filled in yet: what is this for, and for whom?*", "For gardeners.")
    text = text.replace("tags:\n", "tags:\n- gardening\n").replace("---\n\n#", "contact: nobody\n---\n\nHello!\n\n#", 1)
    file.write_text(text.replace("## Scores", "## Scores that I made up"), "utf-8")
    made = write_card(at_work / "one", Said(license="mit", data_license="cc0-1.0"))
    again = write_card(at_work / "one").text
    assert again == made.text == file.read_text("utf-8")
    assert "For gardeners." in again
    assert "Hello!" in again
    assert "made up" not in again  # between the marks it is coadapt's
    metadata = front(again)
    assert metadata["contact"] == "nobody"
    assert "gardening" in metadata["tags"]
    assert (metadata["license"], metadata["data_license"]) == ("mit", "cc0-1.0")
    assert "| licence of the data | cc0-1.0 |" in again


def test_a_card_of_somebody_else_is_left_alone(at_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = at_work / "one" / "README.md"
    file.write_text("# Mine\n", "utf-8")
    assert run(["card", str(at_work / "one")]) == 2
    assert "was not made by coadapt, and is left as it is" in capsys.readouterr().err
    assert file.read_text("utf-8") == "# Mine\n"
    file.write_text(f"# Mine\n\n{BEGIN}\n{END}\n\nThe end.\n", "utf-8")
    assert run(["card", str(at_work / "one")]) == 0
    text = file.read_text("utf-8")
    assert "# Mine" in text
    assert "## How to use it" in text
    assert text.endswith("The end.\n")
    file.write_text(f"---\na: [\n---\n{BEGIN}\n{END}\n", "utf-8")
    assert run(["card", str(at_work / "one")]) == 2
    assert "is no valid YAML" in capsys.readouterr().err


def test_the_licence_that_the_data_states(tmp_path: Path) -> None:
    for name, file, text in (
        ("card", "README.md", "---\nlicense: cc-by-4.0\n---\n"),
        ("several", "README.md", "---\nlicense: [mit, cc0-1.0]\n---\n"),
        ("saved", "dataset_info.json", '{"license": "odbl"}'),
        ("silent", "README.md", "# Data\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text, "utf-8")
    found = [licence_of(str(tmp_path / name)) for name in ("card", "several", "saved", "silent", "not-there")]
    assert found == ["cc-by-4.0", "mit, cc0-1.0", "odbl", None, None]


@pytest.mark.filterwarnings(OF_PEFT)
def test_a_folder_without_a_run_has_a_card_too(at_work: Path) -> None:
    """As `save_pretrained` leaves it."""
    view = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny/base"), LoraConfig(r=3, target_modules=["q_proj"]))
    view.save_pretrained("bare")
    card = write_card(at_work / "bare").text
    assert "No run is recorded in this folder." in card
    assert "| `default` | lora | 4 (q_proj) | 3,072 | r=3 |" in card
    assert not (at_work / "bare" / "loss.png").exists()
    torch.manual_seed(0)
    for text in lines_of(card, "python"):
        exec(compile(text.replace("max_new_tokens=64", "max_new_tokens=2"), "bare", "exec"), {})


def test_a_picture_is_drawn_where_there_is_only_a_log(at_work: Path) -> None:
    (at_work / "one" / "loss.png").unlink()
    assert "(loss.png)" in write_card(at_work / "one").text
    assert (at_work / "one" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_time_is_counted_over_resumes() -> None:
    assert run_time([{"train/runtime": 3.0}, {"eval/loss": 1}, {"train/runtime": 5.0}, {"train/runtime": 2.0}]) == 7.0
    assert run_time([]) == 0.0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "There is no folder 'nowhere'"),
        (["data"], "holds no adapter"),
        (["one/checkpoint-4"], "is a checkpoint of transformers' Trainer"),
        (["one", "--repo", "a b/c"], "cannot be the name of a repository"),
        (["one", "--base-model", "base"], "does not say whose"),
    ],
)
def test_what_cannot_be_is_said(at_work: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    before = (at_work / "one" / "README.md").read_bytes()
    assert run(["card", *args]) == 2
    assert said in capsys.readouterr().err
    assert (at_work / "one" / "README.md").read_bytes() == before
