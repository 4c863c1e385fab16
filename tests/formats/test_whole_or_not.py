"""Files appear whole or not at all; what does not fit is told, all of it at once, and nothing is attached."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


# ---- a save that is cut off (by real kills: tests/test_killed.py) ----------------------------------------------------


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

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        get_peft_model(llama(), LoraConfig(r=4)).save_pretrained(tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in names(tmp_path)} == before
    with torch.no_grad():
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(old))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk is to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [400, 6000], ids=["json", "weights"])
def test_no_room_is_said_and_changes_nothing(tmp_path: Path, size: int) -> None:
    old = saved(tmp_path)
    before = {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}
    larger = get_peft_model(llama(), LoraConfig(r=1 if size == 400 else 16))
    message = rf"{tmp_path} could not be written, and is as it was before: .*large.*GiB are free there\). Make room"
    with files_of_at_most(size), pytest.raises(OSError, match=message):
        larger.save_pretrained(tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in names(tmp_path)} == before
    with torch.no_grad():
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(old))
    with files_of_at_most(10), pytest.raises(OSError, match=r"run\.yaml could not be written"):
        with files.aside(tmp_path / "run.yaml") as part:
            part.write_text("x" * 100)
    assert names(tmp_path) == sorted(before)


def test_the_disk_holds_all_of_it_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = get_peft_model(llama(), LoraConfig(r=2))
    for name in "abc":
        view.add_adapter(name, LoraConfig(r=2))
    held: set[int] = set()
    sync, replace = os.fsync, Path.replace
    seen: list[bool] = []

    def renamed(self: Path, target: Path) -> Path:
        written = [file.stat() for file in self.rglob("*") if file.is_file()] if self.is_dir() else []
        seen.extend(file.st_ino in held for file in written if file.st_size)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda file: held.add(os.fstat(file).st_ino) or sync(file))
    monkeypatch.setattr(Path, "replace", renamed)
    view.save_pretrained(tmp_path)
    assert len(seen) == 4 * len(PLAIN) + 1 and all(seen)


def test_a_disk_that_fails_to_hold_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved(tmp_path)

    def failed(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failed)
        stir(old.adapters, seed=5)
        with pytest.raises(OSError, match="Input/output"):
            old.save_pretrained(tmp_path)
    assert names(tmp_path) == PLAIN
    PeftModel.from_pretrained(llama(), tmp_path)


def test_tensors_in_the_same_memory_are_written_each_for_itself(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "again": whole, "rows": whole[1:], "turned": whole.T, "cut": whole[:, 1:3]}
    with files.saving(tmp_path) as new:
        new.tensors("all.safetensors", tensors)
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


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
    (tmp_path / ".coadapt-writing.run.yaml").write_text("remains of a process that was killed, longer than what comes")
    with files.aside(file) as part:
        part.write_text("newer")
    assert file.read_text() == "newer" and names(tmp_path) == ["run.yaml"]
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
