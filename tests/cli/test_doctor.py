"""What is looked at, what a wrong version leads to, and that nothing is told to work that does not."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from coadapt import versions
from coadapt.cli import doctor
from coadapt.model import PeftModel
from coadapt.training import machine, selftest
from coadapt.versions import Finding, State

Call = Callable[..., tuple[int, str, str]]


class Environment:
    """What pip has written of distributions, in a folder that is looked at before all others."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.gone, real = folder, set[str](), metadata.version
        monkeypatch.syspath_prepend(folder)

        def version(name: str) -> str:
            if name in self.gone:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "version", version)

    def install(self, name: str, version: str, *more: str) -> None:
        """As if `pip install name==version` had run."""
        for old in self.folder.glob(f"{name.replace('-', '_')}-*"):
            shutil.rmtree(old)
        made = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        made.mkdir()
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "\n".join(more))
        importlib.invalidate_caches()
        versions.require.cache_clear()


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Environment]:
    """Distributions can be installed, and be gone."""
    (tmp_path / "site").mkdir()
    versions.require.cache_clear()
    yield Environment(tmp_path / "site", monkeypatch)
    versions.require.cache_clear()


def states(findings: Iterator[Finding]) -> Mapping[tuple[str, str], State]:
    return {(finding.part, finding.name): finding.state for finding in findings}


# ---- versions --------------------------------------------------------------------------------------------------------


def test_bounds_are_those_of_the_project() -> None:
    project = Path(versions.__file__).parents[2] / "pyproject.toml"
    text = project.read_text("utf-8")
    assert {str(r) for r in versions.declared().needed} >= {"transformers>=5", "click>=8.1"}
    assert all(f'"{r}"' in text for r in versions.declared().needed)
    assert str(versions.declared().extras["tensorboard"][0]) == "tensorboard>=2.16"


def test_bounds_are_those_of_the_installed_project(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["click>=8", "tomli>=2; python_version < '3'", 'optuna>=4; extra == "search"']
    asked = [f"Requires-Dist: {line}" for line in lines]
    environment.install("coadapt", "0.1.0", "Requires-Python: >=3.11", *asked, "Provides-Extra: search")
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "lib" / "coadapt" / "versions.py"))
    versions.declared.cache_clear()
    try:
        found = versions.declared()
        assert ([str(r) for r in found.needed], str(found.python)) == (["click>=8"], ">=3.11")
        assert {name: [r.name for r in extra] for name, extra in found.extras.items()} == {"search": ["optuna"]}
    finally:
        versions.declared.cache_clear()


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("5.0.0", ">=5", True),
        ("4.57.3", ">=5", False),
        ("2.9.0a0+git50eac81", ">=2.9", True),
        ("2.10.0+cu128", ">=2.9", True),
        ("2.8.0+cu128", ">=2.9", False),
        ("mine", ">=2.9", True),
    ],
)
def test_previews_and_local_builds_count_as_their_release(version: str, wanted: str, good: bool) -> None:
    assert versions.fits(version, wanted) is good


def test_a_version_that_is_too_old_is_named_with_what_mends_it(environment: Environment) -> None:
    versions.require()
    environment.install("transformers", "4.57.3")
    with pytest.raises(ImportError) as caught:
        versions.require()
    wanted = "transformers 4.57.3 is installed; coadapt needs transformers>=5. Mend it with: "
    assert str(caught.value) == wanted + "pip install -U 'transformers>=5'"


def test_known_bad_optional_parts_are_told_when_they_are_asked_for(environment: Environment) -> None:
    environment.install("bitsandbytes", "0.44.1")
    versions.require()
    with pytest.raises(ImportError, match=r"bitsandbytes 0\.44\.1 is installed, which does not work: .*triton\.ops"):
        versions.require("bitsandbytes")
    assert states(versions.check())["optional parts", "bitsandbytes"] == "warning"
    environment.install("bitsandbytes", "0.50.2")
    assert states(versions.check())["optional parts", "bitsandbytes"] == "ok"


def test_what_is_missing_and_what_parts_ask_of_one_another_is_found(environment: Environment) -> None:
    asked = next(r for r in map(Requirement, metadata.requires("transformers") or []) if r.name == "tokenizers")
    environment.install("tokenizers", "0.1.0")
    environment.gone |= {"accelerate", "optuna"}
    found = {(f.part, f.name): f for f in versions.check()}
    assert found["versions", "accelerate"].state == "broken"
    assert str(found["versions", "accelerate"].mend).startswith("pip install 'accelerate>=")
    assert found["versions", "tokenizers"].state == "broken"
    assert found["versions", "tokenizers"].mend == f"pip install -U 'tokenizers{asked.specifier}'"
    assert "0.1.0 is installed" in found["versions", "tokenizers"].said
    assert found["optional parts", "optuna"].state == "absent"
    assert found["optional parts", "optuna"].mend == "pip install optuna"


@pytest.mark.parametrize(
    "program",
    [
        "from coadapt import PeftModel",
        pytest.param("from coadapt.cli import main; main(['show', '.'])", marks=pytest.mark.full),
    ],
)
def test_a_program_with_an_old_transformers_gets_one_clear_error(program: str, environment: Environment) -> None:
    environment.install("transformers", "4.57.3")
    path = os.pathsep.join([str(environment.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "transformers 4.57.3 is installed; coadapt needs transformers>=5." in done.stderr
    assert ("Traceback" in done.stderr) == ("main" not in program)


def test_an_import_that_fails_is_explained_by_what_is_missing(environment: Environment) -> None:
    error = ImportError("No module named 'datasets'")
    outer = ImportError("transformers cannot be imported")
    outer.__cause__ = error
    assert versions.explain(outer) == "No module named 'datasets'"
    assert versions.explain(ImportError("cannot import name 'x'", name="coadapt.model")) is None
    environment.gone.add("datasets")
    assert str(versions.explain(error)).startswith("No module named 'datasets'. Not installed, but needed: datasets>=")


# ---- what works ------------------------------------------------------------------------------------------------------


def test_what_this_machine_has_is_told(call: Call) -> None:
    code, text, said = call("doctor", "--json")
    assert code == 0, said
    told = json.loads(text)
    found = {(f["part"], f["name"]): f for f in told["findings"]}
    assert told["ok"] is True
    assert {part for part, _ in found} == {
        *("versions", "optional parts", "devices", "precision", "attention", "places", "self-test", "quantisers")
    }
    assert found["versions", "torch"]["said"] == torch.__version__
    assert found["devices", "cpu"]["state"] == "ok"
    assert found["self-test", "adapters"]["state"] == "ok"
    assert set(found["attention", "sdpa"]) == {"part", "name", "state", "said", "mend"}


def test_something_broken_is_told_last_with_its_command_and_exit_code_1(call: Call, environment: Environment) -> None:
    environment.install("click", "7.0")
    code, text, _ = call("doctor")
    assert code == 1
    assert "✗ click" in text
    end = text.split("\n\n")[-1].splitlines()
    assert end[0] == "1 thing that coadapt needs does not work here:"
    assert end[1] == "  click: pip install -U 'click>=8.1'"


def test_a_part_that_cannot_be_loaded_is_a_finding_with_what_mends_it(
    call: Call, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    (environment.folder / "broken_part.py").write_text("raise ModuleNotFoundError('gone', name='tokenizers')")
    monkeypatch.setattr(doctor, "CHECKS", {"self-test": "broken_part:look", "quantisers": "broken_part:look"})
    environment.install("tokenizers", "0.1.0")
    code, text, _ = call("doctor", "--json")
    found = {f["name"]: f for f in json.loads(text)["findings"]}
    assert (code, found["self-test"]["state"], found["quantisers"]["state"]) == (1, "broken", "warning")
    assert found["self-test"]["mend"].startswith("pip install -U 'tokenizers")


def test_a_step_that_trains_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(torch.optim.AdamW):
        def step(self, closure: object = None) -> None: ...

    assert states(selftest.selftest()) == {("self-test", "adapters"): "ok"}
    monkeypatch.setattr(torch.optim, "AdamW", Still)
    (finding,) = selftest.selftest()
    assert (finding.state, "left the lora as it was" in finding.said) == ("broken", True)


def test_adapters_that_come_back_otherwise_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load = PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def other(cls: type[PeftModel], *args: object) -> PeftModel:
        view = load(cls, *args)
        with torch.no_grad():
            next(view.get_adapter("prompt").parameters()).mul_(2)
        return view

    monkeypatch.setattr(PeftModel, "from_pretrained", classmethod(other))
    (finding,) = selftest.selftest()
    assert (finding.state, "give other logits" in finding.said) == ("broken", True)


def test_a_wrong_gradient_is_told_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(states(machine.precision()).values()) <= {"ok", "absent"}
    real = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: real(self * 1.2))
    found = {f.name: f for f in machine.precision()}
    assert found["fp32"].state == "broken"
    assert "the gradient is off by 20%" in found["fp32"].said


def test_a_quantiser_is_ok_only_where_its_layer_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, environment: Environment
) -> None:
    environment.gone |= set(selftest.QUANTISERS)
    assert set(states(selftest.quantisers()).values()) == {"absent"}
    environment.gone.clear()
    for name, version in (("torchao", "99.0"), ("hqq", "99.0"), ("bitsandbytes", "0.1")):
        environment.install(name, version)
    tries = {"torchao": lambda layer, _: layer, "hqq": lambda *_: torch.nn.Identity(), "bitsandbytes": lambda *_: None}
    monkeypatch.setattr(selftest, "QUANTISERS", tries)
    monkeypatch.setattr(selftest, "best", lambda: torch.device("cpu"))
    found = {f.name: f for f in selftest.quantisers()}
    assert {name: f.state for name, f in found.items()} == {
        "torchao": "ok",
        "hqq": "warning",
        "bitsandbytes": "warning",
    }
    assert "a layer's output is off by" in found["hqq"].said
    assert str(found["bitsandbytes"].mend).startswith("pip install -U 'bitsandbytes>=")


def test_the_cache_and_the_hub_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = {f.name: f for f in machine.places()}
    assert found["hub cache"].said.startswith(f"{tmp_path / 'home' / 'hub'}, ")
    assert "HF_HUB_OFFLINE is set" in found["hub"].said
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    full = {f.name: f for f in machine.places()}["hub cache"]
    assert (full.state, "0.5 GiB free" in full.said, "HF_HOME" in str(full.mend)) == ("warning", True, True)
