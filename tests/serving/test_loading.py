"""Adapters come and go while others are asked: only out of one folder, and whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from coadapt import PeftModel, ReftConfig, get_peft_model
from coadapt.demo import BASE
from coadapt.serving.engine import Engine
from coadapt.serving.opening import Given, introduced, listed

ASKED: dict[str, Any] = {"prompt": "Mia hid the kite.\nQ: Who hid the kite?\nA:", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def loads(http: httpx.Client) -> Callable[..., httpx.Response]:
    def load(name: Any, path: Any = "spare", **more: Any) -> httpx.Response:
        return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})

    return load


@pytest.fixture
def unloads(http: httpx.Client) -> Callable[[str], httpx.Response]:
    return lambda name: http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_it_comes_answers_and_goes(
    http: httpx.Client,
    loads: Callable[..., httpx.Response],
    unloads: Callable[[str], httpx.Response],
    expected: Callable[..., str],
    adapters: Path,
) -> None:
    for path in ("spare", str(adapters / "spare")):
        card = loads("new", path).json()
        assert (card["id"], card["parent"], card["root"]) == ("new", "base", str((adapters / "spare").resolve()))
        assert card in http.get("/v1/models").json()["data"]
        for model in ("new", "0.5*new + other"):
            said = http.post("/v1/completions", json={"model": model, **ASKED}).json()["choices"][0]["text"]
            assert said == expected(model.replace("new", "task"))
        taken = loads("new")
        assert (taken.status_code, taken.json()["error"]["code"]) == (400, "model_exists")
        assert unloads("new").json() == {"id": "new", "object": "model", "deleted": True}
        assert http.post("/v1/completions", json={"model": "new", **ASKED}).status_code == 404
        assert unloads("new").status_code == 404


def test_what_cannot_be_served_says_so(
    http: httpx.Client, loads: Callable[..., httpx.Response], unloads: Callable[[str], httpx.Response], adapters: Path
) -> None:
    """Found out when it is asked: the client's to mend, and not a fault of the server."""
    view = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), ReftConfig(r=2))
    view.save_pretrained(adapters / "reads-ends")
    assert loads("reads-ends", "reads-ends").status_code == 200
    found = http.post("/v1/completions", json={"model": "reads-ends", **ASKED})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "cannot_be_served")
    assert "counts from a text's end" in found.json()["error"]["message"]
    unloads("reads-ends")
    shutil.rmtree(adapters / "reads-ends")


@pytest.mark.parametrize(
    "name", ["", "a b", "a+b", "../x", "-a", ".a", "a/b", "é", "a" * 97, "a\n", "base", "task", "1", "gates"]
)
def test_names(loads: Callable[..., httpx.Response], name: str) -> None:
    told = loads(name).json()["error"]
    assert told["param"] == "lora_name" and told["code"] in ("invalid_value", "model_exists")


def test_paths_stay_in_the_folder(
    loads: Callable[..., httpx.Response], adapters: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(adapters / "task", outside)
    (adapters / "link").symlink_to(outside)
    linked = adapters / "linked"
    shutil.copytree(adapters / "task", linked)
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (adapters / "empty").mkdir()

    def clear() -> None:
        (adapters / "link").unlink()
        shutil.rmtree(linked)
        (adapters / "empty").rmdir()

    request.addfinalizer(clear)
    answers = set()
    for path in (
        outside,
        "link",
        "linked",
        "empty",
        "..",
        ".",
        "/",
        "/etc",
        "../../etc/passwd",
        "spare/../..",
        "no",
        "\0",
    ):
        found = loads("new", str(path))
        assert (found.status_code, found.json()["error"]["code"]) == (404, "adapter_not_found"), path
        answers.add(found.json()["error"]["message"].replace(repr(str(path)), "PATH"))
    assert len(answers) == 1  # whether it is there outside, nobody learns


def test_what_does_not_fit_is_not_there(
    http: httpx.Client, loads: Callable[..., httpx.Response], adapters: Path, request: pytest.FixtureRequest
) -> None:
    broken = adapters / "broken"
    shutil.copytree(adapters / "task", broken)
    request.addfinalizer(lambda: shutil.rmtree(broken))
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    found = loads("new", "broken")
    assert (found.status_code, found.json()["error"]["code"]) == (400, "adapter_does_not_fit")
    assert "damaged" in found.json()["error"]["message"]
    assert http.post("/v1/completions", json={"model": "new", **ASKED}).status_code == 404
    for body in (
        {"lora_name": "x"},
        {"lora_name": 5, "lora_path": "spare"},
        {"lora_name": "x", "lora_path": "y", "z": 1},
    ):
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 400


def test_more_adapters_than_there_is_room_for(start: Callable[..., Any], expected: Callable[..., str]) -> None:
    with start(loaded=1) as one, one.http() as http:
        for model in ("task", "other", "task", "soft"):
            said = http.post("/v1/completions", json={"model": model, **ASKED}).json()["choices"][0]["text"]
            assert said == expected(model)
        found = http.post("/v1/completions", json={"model": "task + other", **ASKED})
        assert found.status_code == 400 and "1 at most" in found.json()["error"]["message"]
        assert one.serving.engine.stats.evictions == 3
        assert "coadapt_adapter_evictions_total 3.0" in http.get("/metrics").text


def test_without_a_folder_and_for_what_was_given(adapters: Path, start: Callable[..., Any]) -> None:
    with start() as one, one.http() as http:
        catalog = one.serving.catalog
        catalog.adapters_dir = None
        for verb, more in (("load", {"lora_path": "spare"}), ("unload", {})):
            found = http.post(f"/v1/{verb}_lora_adapter", json={"lora_name": "other", **more})
            assert (found.status_code, found.json()["error"]["code"]) == (403, "loading_is_off")
        catalog.adapters_dir = adapters
        catalog.entries["task"] = type(catalog.entries["task"]).read("task", adapters / "task", given=True)
        for name in ("task", "base"):
            found = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            assert (found.status_code, found.json()["error"]["code"]) == (400, "model_stays")


def test_a_damaged_folder_among_many_is_left_out(adapters: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    many = tmp_path / "many"
    for folder in (outside, many / "good", many / "bad", many / "worse", many / "a name"):
        shutil.copytree(adapters / "task", folder)
    (many / "bad" / "adapter_model.safetensors").unlink()
    (many / "worse" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3}))
    (many / "link").symlink_to(outside)
    entries, notes = listed([], many)
    engine = Engine(PeftModel(AutoModelForCausalLM.from_pretrained(BASE)), AutoTokenizer.from_pretrained(BASE))
    kept, more = introduced(engine, entries, 8)
    assert [entry.name for entry in kept] == ["good"]
    said = "\n".join([*notes, *more])
    assert [line.split(" is left out: ")[0] for line in said.splitlines() if "is left out" in line] == [
        str(many / name) for name in ("a name", "bad", "link", "worse")
    ]
    with pytest.raises(ValueError, match="does not fit this model"):
        introduced(engine, listed([Given(name="worse", folder=many / "worse")], None)[0], 8)
    engine.stop()
