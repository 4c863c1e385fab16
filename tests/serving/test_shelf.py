"""Adapters come and go while requests are served; those that are not used make room."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coadapt import LoraConfig, PeftModel, PromptTuningConfig
from coadapt.serving.engine import Engine
from coadapt.serving.request import Request
from models import llama, stir
from serving.asking import TOKENIZER, Heard, alone, asked, base, engine, prompt


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a, b, c, d: one adapter each; mix: two and a learned gate; foreign: of another model; broken, empty: none."""
    where = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate("abcd"):
        view = PeftModel(
            base("llama"), PromptTuningConfig(num_virtual_tokens=3) if name == "d" else LoraConfig(r=2 + i)
        )
        stir(view.get_adapter("default"), seed=i, by=0.3)
        view.save_pretrained(where / name)
    view = PeftModel(base("llama"), LoraConfig(r=2), "task")
    view.add_adapter("style", PromptTuningConfig(num_virtual_tokens=2))
    stir(view.adapters, seed=9, by=0.3)
    view.set_adapter("learned*task + style")
    stir(view.gates, seed=3, by=0.5)
    view.save_pretrained(where / "mix")
    PeftModel(llama(hidden_size=16), LoraConfig(r=2)).save_pretrained(where / "foreign")
    shutil.copytree(where / "a", where / "broken")
    (where / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    (where / "empty").mkdir()
    return where


def request(name: str | None, seed: int = 0, **options: Any) -> Request:
    told: dict[str, Any] = {"tokens": prompt(5, seed), "max_tokens": 8, "temperature": 0, "logprobs": 0, **options}
    return Request(adapters=name, **told)


def expected(folders: Path, name: str | None, one: Request, node: Any = None) -> list[int]:
    """What a folder's adapter writes by itself."""
    if name is None:
        return alone(PeftModel(base("llama")), one)
    view = PeftModel.from_pretrained(base("llama"), folders / name)
    with view.using(view.composition if node is None else node):
        ids = torch.tensor([one.tokens])
        out: Any = view.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
                                 pad_token_id=0, eos_token_id=2)  # fmt: skip
    return out[0, len(one.tokens) :].tolist()


def test_more_folders_than_are_attached_at_a_time(folders: Path) -> None:
    asking = [request(name, i) for i, name in enumerate(["a", "b", "c", None, "d", "mix"] * 2)]
    with engine(PeftModel(base("llama")), rows=4, loaded=2) as made:
        for name in ("a", "b", "c", "d", "mix"):
            made.offer(name, folders / name)
        heard = asked(made, asking)
        stats = made.stats
    for one, found in zip(asking, heard, strict=True):
        assert found.tokens == expected(folders, one.adapters, one), one.adapters
    assert stats.known == 5
    assert len(stats.attached) == 2
    assert stats.evictions == stats.loads - 2 > 0


def test_folders_in_one_composition(folders: Path) -> None:
    one = request("a + 0.5*b")
    view = PeftModel.from_pretrained(base("llama"), folders / "a", "a")
    view.load_adapter(folders / "b", "b")
    with engine(PeftModel(base("llama")), loaded=2) as made:
        for name in "abc":
            made.offer(name, folders / name)
        (found,) = asked(made, [one])
        assert found.tokens == alone(view, one)
        with pytest.raises(ValueError, match="takes 3 adapters, and 2 at most"):
            made.submit(request("a + b + c"), Heard())


def test_the_least_recently_used_goes(folders: Path) -> None:
    with engine(PeftModel(base("llama")), loaded=2) as made:
        for name in "abc":
            made.offer(name, folders / name)
        for name in ("a", "b", "a", "c"):
            asked(made, [request(name)])
        assert sorted(made.stats.attached) == ["a", "c"]


@pytest.mark.filterwarnings("ignore:.*was trained on a base with other modules")
@pytest.mark.parametrize("name", ["broken", "empty", "foreign"])
def test_a_folder_that_cannot_be_loaded_is_one_requests_error(folders: Path, name: str) -> None:
    with engine(PeftModel(base("llama")), loaded=2) as made:
        made.offer("bad", folders / name)
        made.offer("a", folders / "a")
        heard = asked(made, [request("a"), request("bad"), request("a", 1), request("bad + a")])
        assert [h.last.finish == "error" for h in heard] == [False, True, False, True]
        assert "'bad' cannot be loaded: " in str(heard[1].last.error)
        for i in (0, 2):
            assert heard[i].tokens == expected(folders, "a", request("a", i // 2))
        before = made.stats
        with pytest.raises((ValueError, FileNotFoundError)):
            made.load("worse", folders / name)
        assert made.stats.known == before.known
        assert made.stats.attached == before.attached
    assert [n for n in made.model.view.peft_config if n != "a"] == []


def test_loading_and_unloading_while_serving(folders: Path) -> None:
    view = PeftModel(base("llama"))
    with engine(view, rows=3, loaded=2) as made:
        with pytest.raises(FileNotFoundError):
            made.load("a", folders / "none")
        made.load("a", folders / "a")
        assert made.stats.attached == ("a",)
        with pytest.raises(ValueError, match="'a' already"):
            made.load("a", folders / "b")
        long = [request("a", i, max_tokens=100) for i in range(4)]
        heard = [Heard() for _ in long]
        for one, found in zip(long, heard, strict=True):
            made.submit(one, found)
        while not heard[0].pieces:
            time.sleep(0.001)
        made.unload("a")
        with pytest.raises(ValueError, match="no adapter 'a'"):
            made.submit(request("a"), Heard())
        made.load("a", folders / "b")  # another one of that name, at once
        (new,) = asked(made, [request("a")])
        assert new.tokens == expected(folders, "b", request("a"))
        for one, found in zip(long, heard, strict=True):
            assert found.wait().tokens[:8] == expected(folders, "a", one)
            assert found.last.error is None
        asked(made, [request(None)])
        assert len(view.peft_config) == 1  # the first one is gone
        made.unload("a")
        with pytest.raises(ValueError, match="no adapter 'a'"):
            made.unload("a")
    assert not view.peft_config


def test_what_came_with_the_model_stays(folders: Path) -> None:
    view = PeftModel.from_pretrained(base("llama"), folders / "a", "own")
    with engine(view, loaded=1) as made:
        made.offer("b", folders / "b")
        made.offer("c", folders / "c")
        heard = asked(made, [request(name) for name in ("own", "b", "c", "own + c")])
        assert all(h.last.error is None for h in heard)
        assert heard[0].tokens == expected(folders, "a", request("own"))
        with pytest.raises(ValueError, match="came with the model"):
            made.unload("own")


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "1"])
def test_names_that_cannot_be(folders: Path, name: str) -> None:
    made = Engine(PeftModel(base("llama")), TOKENIZER)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        made.load(name, folders / "a")
    assert made.stats.known == 0


def test_who_leaves_while_its_adapter_is_read(folders: Path) -> None:
    """Nothing is kept for it."""
    made = Engine(PeftModel(base("llama")), TOKENIZER, loaded=1)
    going, read = threading.Event(), made.shelf.view.read

    def slowly(*args: Any) -> Any:
        assert going.wait(60)
        return read(*args)

    made.shelf.view.__dict__["read"] = slowly
    made.offer("a", folders / "a")
    made.offer("b", folders / "b")
    made.start()
    gone, other = Heard(), Heard()
    ticket = made.submit(request("a"), gone)
    made.submit(request(None), other)
    assert other.wait().last.error is None  # it does not wait for the reading
    ticket.cancel()
    assert gone.wait().last.finish == "cancelled"
    going.set()
    (found,) = asked(made, [request("b")])
    assert found.tokens == expected(folders, "b", request("b"))
    made.stop()


def test_the_base_is_left_as_it_was(folders: Path) -> None:
    model = base("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    view = PeftModel(model)
    with engine(view, loaded=1) as made:
        for name in "abd":
            made.offer(name, folders / name)
        asked(made, [request(name) for name in "abdab"])
        for name in "abd":
            made.unload(name)
        asked(made, [request(None)])
    assert not view.peft_config
    view.unload()
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
