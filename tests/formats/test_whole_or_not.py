"""Files appear whole or not at all; what does not fit is told, all of it at once, and nothing is attached."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coadapt import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from coadapt.core.site import Site
from coadapt.formats import files
from models import llama, logits, stir


def saved(folder: Path, config: PeftConfig | None = None, seed: int = 1) -> PeftModel:
    view = get_peft_model(llama(), config or LoraConfig(r=2))
    stir(view.adapters, seed=seed)
    view.save_pretrained(folder)
    return view.eval()


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


PLAIN = ["adapter_config.json", "adapter_model.safetensors", "provenance.json"]


# ---- a save that is cut off ------------------------------------------------------------------------------------------

KILLED = """
import sys, itertools, torch
from pathlib import Path
from coadapt.core.site import Site
from coadapt.formats import files
folder = Path(sys.argv[1])
for number in itertools.count(int(sys.argv[2])):
    with files.saving(folder) as new:
        for part in ("", "part/"):
            new.tensors(part + "adapter_model.safetensors", {"number": torch.full((50_000,), float(number))})
            new.tensors(part + "training_state.safetensors", {"number": torch.tensor(number)} if number % 2 else {})
            new.json(part + "adapter_config.json", {"number": number, "text": "x" * 20_000})
        new.json("composition.json", {"number": number})
    print(number, flush=True)
"""


def numbers(folder: Path) -> set[int]:
    """What the files of a save say its number was; one if they are of one save."""
    found = {int(files.read_json(folder / "composition.json")["number"])}
    for part in (folder, folder / "part"):
        weights = files.read_tensors(part / "adapter_model.safetensors")["number"]
        found |= {int(weights.min()), int(weights.max()), int(files.read_json(part / "adapter_config.json")["number"])}
        training = part / "training_state.safetensors"
        found |= {int(files.read_tensors(training)["number"])} if training.is_file() else set()
        assert training.is_file() == bool(next(iter(found)) % 2)
    return found


def test_killed_at_any_moment_either_all_files_are_old_or_all_are_new(tmp_path: Path) -> None:
    """The process is killed with SIGKILL after other times; each next one goes on in the same folder."""
    last, deadline, kills = -1, time.monotonic() + 8, 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    while time.monotonic() < deadline or kills < 2:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(last + 1)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert process.stdout is not None
        told = int(process.stdout.readline())
        time.sleep(0.001 * (kills * 7 % 23))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        told = int(rest[-1]) if rest else told
        kills += 1
        files.settle(tmp_path)
        (number,) = numbers(tmp_path)
        assert number in (told, told + 1)
        last = number
    with files.saving(tmp_path) as new:
        new.json("composition.json", {"number": 0})
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def _cut_at(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Makes the `number`-th use of a method of Path raise, as if the process had ended there."""
    own: Callable[..., Any] = getattr(Path, call)
    count = 0

    def counted(self: Path, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count >= number:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Path, call, counted)


@pytest.mark.parametrize("step", range(1, 9))
def test_cut_off_at_every_step(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`replace` is the one step that changes what readers see: the folder's own, then each file's."""
    old = saved(tmp_path)
    new = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=32))
    stir(new.adapters, seed=7)
    with monkeypatch.context() as patch:
        _cut_at(patch, "replace", step)
        try:
            new.save_pretrained(tmp_path)
            assert step > 4
        except KeyboardInterrupt:
            assert step <= 4
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    if config.is_file():  # programs that know nothing of `settle` see a config with its own weights, or no config
        rank = load_file(weights)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0]
        assert f'"r": {rank},' in config.read_text()
    again = PeftModel.from_pretrained(llama(), tmp_path)
    expected = old if step == 1 else new.eval()
    with torch.no_grad():
        assert torch.equal(logits(again), logits(expected))
    assert names(tmp_path) == PLAIN


def test_a_part_that_was_cut_off_is_found_from_its_own_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = get_peft_model(llama(), LoraConfig(r=2), "task")
    stir(view.adapters)
    with monkeypatch.context() as patch:
        _cut_at(patch, "replace", 2)
        with pytest.raises(KeyboardInterrupt):
            view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "task")
    with torch.no_grad():
        assert torch.equal(logits(again), logits(view.eval()))


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved(tmp_path)
    before = {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        get_peft_model(llama(), LoraConfig(r=4)).save_pretrained(tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in names(tmp_path)} == before
    with torch.no_grad():
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(old))


def test_one_file_aside(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("old")
    with pytest.raises(RuntimeError), files.aside(file) as part:
        part.write_text("new")
        raise RuntimeError
    assert file.read_text() == "old" and names(tmp_path) == ["run.yaml"]
    with files.aside(file) as part:
        part.write_text("new")
    assert file.read_text() == "new" and names(tmp_path) == ["run.yaml"]
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_a_projection_needed_goes_with_it(tmp_path: Path) -> None:
    saved(tmp_path, PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True))
    assert "training_state.safetensors" in names(tmp_path)
    saved(tmp_path)
    assert names(tmp_path) == PLAIN


# ---- what does not fit -----------------------------------------------------------------------------------------------


def refused(folder: Path, kind: type[Exception] = ValueError, base: Any = None) -> str:
    """What is said when the folder is loaded; nothing may be attached then."""
    base = llama() if base is None else base
    with pytest.raises(kind) as caught:
        PeftModel.from_pretrained(base, folder)
    assert not [m for m in base.modules() if isinstance(m, Site)]
    return str(caught.value)


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    del tensors[first]
    tensors[second] = tensors[second][:1].clone()
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.zeros(2)
    save_file(tensors, file)
    message = refused(tmp_path)
    assert "3 of its tensors" in message
    for line in (f"{first}: not in the file", f"{second}: (1, ", "nowhere.lora_A.weight: not in this adapter"):
        assert line in message


def test_an_adapter_of_a_larger_model(tmp_path: Path) -> None:
    view = get_peft_model(llama(hidden_size=64), LoraConfig(r=2))
    view.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="other modules or shapes"):
        message = refused(tmp_path)
    assert "8 of its tensors" in message
    assert "(2, 64) in the file, (2, 32) in this model" in message


def test_pickles_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "adapter_model.bin" in refused(tmp_path) and "pickle" in refused(tmp_path)


def test_pickles_beside_are_never_opened(tmp_path: Path) -> None:
    view = saved(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with torch.no_grad():
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(view))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_weights(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "text": b"version https://git-lfs", "empty": b""}[damage])
    assert "damaged" in refused(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "nowhere", FileNotFoundError)
    assert "found: nothing" in refused(tmp_path, FileNotFoundError)
    saved(tmp_path / "inner")
    assert "Its sub-folders inner hold one each" in refused(tmp_path, FileNotFoundError)
    (tmp_path / "inner" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refused(tmp_path / "inner", FileNotFoundError)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        get_peft_model(llama(), LoraConfig()).save_pretrained(tmp_path / "file")


def test_remains_of_a_save_are_not_taken_for_adapters(tmp_path: Path) -> None:
    saved(tmp_path / ".coadapt-writing")
    assert "found: nothing" in refused(tmp_path, FileNotFoundError)


def test_a_prompt_of_another_width(tmp_path: Path) -> None:
    get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fingerprint"):
        assert "token_dim" in refused(tmp_path, base=llama(hidden_size=64))
