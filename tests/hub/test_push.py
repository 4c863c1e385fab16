"""Pushing to a hub that runs here: what arrives is the folder's to the byte, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coadapt import LoraConfig, PeftModel, get_peft_model
from coadapt.cli.group import run
from coadapt.formats.package import pack, without_paths

from .conftest import OWNER, READER, Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub sends files so

REPO, ASKED = "me/adapters", ("--base-model", "org/base", "--data-license", "cc0-1.0")


def push(*args: object) -> int:
    return run(["push", *map(str, args), *ASKED])


def test_what_arrives_is_the_folder(at_work: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside everything that must not leave the machine."""
    two = at_work / "two"
    for name in ("optimizer.pt", "notes.txt", "training_args.bin", ".env", "rows.jsonl", "id_rsa"):
        (two / name).write_text("nobody's business", "utf-8")
    outside = at_work / "outside"
    outside.mkdir()
    (outside / "adapter_config.json").write_text("{}", "utf-8")
    (two / "linked").symlink_to(outside)
    (two / "merges.txt").symlink_to(at_work / "data" / "rows.jsonl")
    assert push(two, REPO, "--private", "--message", "The first") == 0
    arrived = hub.repos[REPO]["main"]
    inside = ("adapter_config.json", "adapter_model.safetensors", "provenance.json")
    assert set(arrived) - {".gitattributes"} == {
        *("README.md", "loss.png", "composition.json", "provenance.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *(f"{name}/{file}" for name in ("lora", "prompt") for file in inside),
    }
    changed = {name for name in arrived if name[0] != "." and arrived[name] != (two / name).read_bytes()}
    assert changed == {"provenance.json", *(f"{a}/{f}" for a in ("lora", "prompt") for f in (inside[0], inside[2]))}
    for name in changed:
        before, after = json.loads((two / name).read_text("utf-8")), json.loads(arrived[name])
        assert {k: after[k] for k in after if k not in ("base", "data", "base_model_name_or_path")} == {
            k: before[k] for k in before if k not in ("base", "data", "base_model_name_or_path")
        }
        assert after.get("base_model_name_or_path", "org/base") == "org/base"
    everything = b"".join(arrived.values())
    assert str(at_work).encode() not in everything
    assert b"somebody-at-work" not in everything
    assert (hub.private[REPO], [c["summary"] for c in hub.commits]) == (True, ["The first"])
    said = capsys.readouterr().out
    assert "stays here: .env, best, checkpoint-4, evaluation.json, id_rsa, last, linked" in " ".join(said.split())
    assert OWNER not in said
    assert f"{hub.address}/{REPO}/commit/" in said


def test_it_comes_back(at_work: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded by its name, it answers as the folder does; a second time without the hub."""
    assert push("two", REPO) == 0
    hub.repos[REPO]["main"]["pytorch_model.bin"] = b"a pickle"
    base = AutoModelForCausalLM.from_pretrained("tiny/base")
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, "two")(input_ids=tokens).logits
        assert torch.equal(PeftModel.from_pretrained(base, REPO)(input_ids=tokens).logits, wanted)
        assert not any(path.suffix == ".bin" for path in Path(constants.HF_HUB_CACHE).rglob("*"))
        asked = len(hub.asked)
        with pytest.MonkeyPatch.context() as offline:
            offline.setattr(constants, "HF_HUB_OFFLINE", True)
            assert torch.equal(PeftModel.from_pretrained(base, REPO)(input_ids=tokens).logits, wanted)
        assert len(hub.asked) == asked
    capsys.readouterr()
    for place in (REPO, "two"):
        assert run(f"generate --adapter {place} --model tiny/base --prompt Hello --max-new-tokens 6".split()) == 0
    there, here = capsys.readouterr().out.splitlines()
    assert there == here


def test_a_second_push_leaves_nothing_of_the_first(at_work: Path, hub: Hub) -> None:
    assert push("two", REPO) == 0
    assert push("one", REPO) == 0
    assert not any(name.startswith(("lora/", "prompt/")) for name in hub.repos[REPO]["main"])
    assert hub.repos[REPO]["main"]["adapter_model.safetensors"] == Path("one/adapter_model.safetensors").read_bytes()
    assert len(hub.commits) == 2


def test_a_branch(at_work: Path, hub: Hub) -> None:
    for _ in range(2):
        assert push("one", REPO, "--branch", "v2") == 0
    assert set(hub.repos[REPO]["main"]) == {".gitattributes"}
    view = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny/base"), REPO, revision="v2")
    assert list(view.peft_config) == ["default"]
    with pytest.raises(ValueError, match="revision='v2' has no effect: 'one' is a folder"):
        PeftModel.from_pretrained(view.get_base_model(), "one", revision="v2")


def test_a_dry_run_writes_and_sends_nothing(at_work: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = {file: file.read_bytes() for file in Path("one").rglob("*") if file.is_file()}
    assert push("one", REPO, "--dry-run") == 0
    assert {file: file.read_bytes() for file in Path("one").rglob("*") if file.is_file()} == before
    assert hub.asked == []


def test_a_view_pushes_itself(at_work: Path, hub: Hub) -> None:
    view = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny/base"), LoraConfig(r=2))
    assert view.push_to_hub("me/view", private=True, base_model="org/base").startswith(hub.address)
    arrived = hub.repos["me/view"]["main"]
    assert set(arrived) == {".gitattributes", "adapter_config.json", "adapter_model.safetensors", "provenance.json"}
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    view.save_pretrained("saved")
    assert arrived["adapter_model.safetensors"] == Path("saved/adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"names its base as 'tiny/base', a path of this machine"):
        view.push_to_hub("me/view")


@pytest.mark.parametrize("place", ["preupload", "commit", "store", "batch"])
def test_a_push_that_breaks_off_leaves_what_was_there(
    at_work: Path, hub: Hub, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    assert push("two", REPO) == 0
    before = dict(hub.repos[REPO]["main"])
    hub.fails_at = place
    assert push("one", REPO) == 1
    assert hub.repos[REPO]["main"] == before
    assert "501" in capsys.readouterr().err


def test_who_may_not_is_told(
    at_work: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int) -> str:
        capsys.readouterr()
        assert push("one", REPO) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "the hub does not know this token" in refused(1)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "the token has no right to write there" in refused(1)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(at_work / "no-token"))
    assert "There is no token of the hub" in refused(2)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    hub.repos[REPO] = {"main": {".gitattributes": b"", "model.gguf": b""}}
    assert "me/adapters is taken: it holds model.gguf, and no adapter" in refused(1)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set, so nothing is sent" in refused(2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "nobody answers at http://127.0.0.1:9" in refused(1)
    assert hub.commits == []


def _key_in_card(one: Path) -> None:
    (one / "README.md").write_text((one / "README.md").read_text("utf-8") + f"hf_{'a1' * 17}\n", "utf-8")


def _cut_off(one: Path) -> None:
    file = one / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _no_weights(one: Path) -> None:
    (one / "adapter_model.safetensors").unlink()


def _not_finite(one: Path) -> None:
    from safetensors.torch import save_file

    file = one / "adapter_model.safetensors"
    save_file({name: tensor / 0 for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_key_in_card, "README.md holds what looks like a key, so nothing was sent"),
        (_cut_off, "is damaged"),
        (_no_weights, "adapter_model.safetensors is missing"),
        (_not_finite, "is not finite"),
    ],
)
def test_a_folder_that_is_not_whole_stays_here(
    at_work: Path, hub: Hub, capsys: pytest.CaptureFixture[str], spoil: Any, said: str
) -> None:
    spoil(at_work / "one")
    card = (at_work / "one" / "README.md").read_bytes()
    assert push("one", REPO) == 2
    found = capsys.readouterr().err
    assert said in found
    assert "a1a1" not in found
    assert hub.asked == []
    assert (at_work / "one" / "README.md").read_bytes() == card


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nowhere", REPO, *ASKED), "There is no folder 'nowhere'"),
        (("data", REPO, *ASKED), "holds no adapter"),
        (("one", "adapters", *ASKED), "does not say whose repository it is. Write USER/adapters."),
        (("one", "me/a b", *ASKED), "cannot be the name of a repository"),
        (("one", REPO, "--data-license", "mit"), "names its base as 'tiny/base', a path of this machine"),
        (("one", REPO, "--base-model", "org/base"), "Say it with --data-license"),
    ],
)
def test_what_is_asked_wrongly(
    at_work: Path, hub: Hub, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], said: str
) -> None:
    assert run(["push", *args]) == 2
    assert said in capsys.readouterr().err
    assert hub.asked == []


def test_a_card_of_somebody_else_goes_as_it_is(at_work: Path, hub: Hub) -> None:
    (at_work / "one" / "README.md").write_text("# Mine\n", "utf-8")
    assert push("one", REPO) == 0
    assert hub.repos[REPO]["main"]["README.md"] == b"# Mine\n"


def test_the_paths_of_a_machine() -> None:
    assert without_paths({"a": ["/home/me/x.jsonl", "C:\\me\\y", "../z/", "~/w"], "b": "org/base", "c": 1}) == {
        "a": ["x.jsonl", "y", "z", "w"],
        "b": "org/base",
        "c": 1,
    }


def test_without_a_path_to_hide_every_file_is_the_folders(at_work: Path) -> None:
    for file in Path("one").glob("*.json"):
        file.write_text(file.read_text("utf-8").replace("tiny/base", "org/base").replace(str(at_work), ""), "utf-8")
    told = json.loads(Path("one/provenance.json").read_text("utf-8"))
    told["data"]["name"] = "org/rows"
    Path("one/provenance.json").write_text(json.dumps(told), "utf-8")
    assert not any(isinstance(content, bytes) for content in pack(Path("one")).files.values())
