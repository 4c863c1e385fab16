"""The page as a person uses it, in a browser."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from coadapt.cli.group import run
from coadapt.demo import BASE
from coadapt.demo.task import examples
from coadapt.training.presence import process_of
from coadapt.ui import runs
from served_page import QUESTION, browser, free_port, opened, running, settled

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows to train on."""
    folder = tmp_path_factory.mktemp("place")
    for name, split, count in (("train", "train", 200), ("held-out", "held-out", 16)):
        lines = (json.dumps(row) + "\n" for row in examples(split, count, 0))  # type: ignore[arg-type]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return folder


def fill(page: Any, name: str, steps: str) -> None:
    """The form of a small run."""
    page.get_by_label("Model", exact=True).fill(str(BASE))
    page.get_by_label("Data", exact=True).fill("train.jsonl")
    page.get_by_label("Held-out data", exact=True).fill("held-out.jsonl")
    page.get_by_label("or steps").fill(steps)
    page.get_by_label("Name of the run").fill(name)


def values(page: Any, *labels: str) -> list[str]:
    return [page.get_by_label(label, exact=True).first.input_value() for label in labels]


def test_a_form_shows_what_it_means_and_needs_and_a_reload_finds_it(place: Path) -> None:
    port = free_port()
    with browser() as window, running(place, port):
        page: Any = window.new_page()  # type: ignore[attr-defined]
        from playwright.sync_api import expect

        hosts = opened(page, port)
        expect(page.get_by_role("alert")).to_have_count(0)
        fill(page, "mine", "abc")
        expect(page.get_by_role("alert")).to_contain_text("max_steps: Input should be a valid integer")
        page.get_by_label("or steps").fill("20")
        page.get_by_role("button", name="Add an adapter").click()
        page.get_by_label("Composition").fill("lora + 0.5*prompt")
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.get_by_text("composition: lora + 0.5*prompt")).to_be_visible()
        expect(page.get_by_text("--config runs/mine/settings.yaml")).to_be_visible()
        page.get_by_role("button", name="Estimate").click()
        expect(page.get_by_text("It fits.")).to_be_visible()
        page.get_by_role("button", name="Look at the data").click()
        expect(page.get_by_text("prompt + completion (prompt, completion), for causal-lm")).to_be_visible()
        page.get_by_label("Data", exact=True).fill("nothing.jsonl")
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("alert")).to_contain_text("data='nothing.jsonl': there is no such file")
        for data, told in (("train.jsonl", 0), ("nothing.jsonl", 1)):
            page.get_by_label("Data", exact=True).fill(data)
            expect(page.get_by_role("alert")).to_have_count(told)
        page.reload()
        settled(page)
        assert values(page, "Model", "Data", "or steps", "Composition", "Name of the run") == [
            *(str(BASE), "nothing.jsonl", "20", "lora + 0.5*prompt", "mine")
        ]
        expect(page.get_by_label("num_virtual_tokens")).to_be_visible()
        assert set(hosts) == {f"127.0.0.1:{port}"}
        for path in (place / "train.jsonl", "/etc/hostname", BASE / "config.json"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/file={path}")
        code = run(["ui", "--port", str(port)])  # which is in use
        assert code == 2
    assert not (place / "runs").exists()


def press(page: Any, label: str, value: str) -> None:
    """Sets a slider by the number beside it."""
    box = page.get_by_label(f"number input for {label}")
    box.fill(value)
    box.press("Enter")


def answers(page: Any, count: int) -> list[str]:
    """The last answers, of the adapters and of the base, once there are so many of each."""
    from playwright.sync_api import expect

    said = [page.locator(f"#ca-{who} [data-testid=bot]") for who in ("adapted", "base")]
    for each in said:
        expect(each).to_have_count(count)
    before, now = [""], [each.last.inner_text().strip() for each in said]
    while now != before:  # they come piece by piece
        page.wait_for_timeout(2000)
        before, now = now, [each.last.inner_text().strip() for each in said]
    return now


@pytest.mark.full
def test_a_run_is_started_watched_talked_to_and_compared(place: Path) -> None:
    port = free_port()
    with browser() as window, running(place, port):
        page: Any = window.new_page()  # type: ignore[attr-defined]
        from playwright.sync_api import expect

        hosts = opened(page, port)
        fill(page, "first", "40")
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Start").click()
        standing = page.locator(".ca-standing")
        expect(standing).to_contain_text("first")
        expect(standing).to_contain_text("running")
        page.reload()
        settled(page)
        expect(standing).to_contain_text("done")
        expect(page.locator(".ca-plot").first).to_contain_text("held out")
        assert page.get_by_label("first · done").is_checked()
        again = ["train", "--config", "runs/first/settings.yaml", "output_dir=runs/second", "max_steps=20"]
        start = [sys.executable, "-c", "from coadapt.cli import main; main()", *again]
        subprocess.run(start, cwd=place, check=True, capture_output=True)
        expect(page.get_by_label("second · done")).to_be_visible()

        page.get_by_role("tab", name="Chat").click()
        page.get_by_label("Run, or adapter folder").click()
        page.get_by_role("option", name="first").click()
        page.get_by_role("button", name="Load").click()
        expect(page.get_by_label("number input for gate of lora")).to_have_value("1")
        page.get_by_label("The base's answer beside it").check()
        page.get_by_label("Question").fill(QUESTION)
        page.get_by_role("button", name="Ask").click()
        adapted, base = answers(page, 1)
        assert adapted != base
        press(page, "gate of lora", "0")
        expect(page.locator(".ca-sample", has_text="the base")).to_be_visible()
        page.get_by_label("Question").fill(QUESTION)
        page.get_by_role("button", name="Ask").click()
        assert answers(page, 2) == [base, base]
        page.wait_for_timeout(1500)
        page.reload()
        settled(page)
        assert answers(page, 2) == [base, base]
        expect(page.get_by_label("number input for gate of lora")).to_have_value("0")

        page.get_by_role("tab", name="Compare").click()
        page.get_by_label("first · done").last.check()
        page.get_by_label("second · done").last.check()
        expect(page.get_by_role("cell", name="max_steps")).to_be_visible()
        expect(page.locator(".ca-plot", has_text="second").last).to_contain_text("first")
        assert set(hosts) == {f"127.0.0.1:{port}"}


@pytest.mark.full
def test_a_page_that_is_killed_leaves_its_runs_and_finds_them_again(place: Path) -> None:
    port = free_port()
    folder = place / "runs" / "long"
    with browser() as window:
        page: Any = window.new_page()  # type: ignore[attr-defined]
        from playwright.sync_api import expect

        with running(place, port) as server:
            opened(page, port)
            fill(page, "long", "100000")
            page.wait_for_timeout(1500)
            page.get_by_role("button", name="Start").click()
            expect(page.locator(".ca-standing")).to_contain_text("Step")
            trainer = process_of(folder)
            assert trainer is not None
            server.send_signal(signal.SIGKILL)
            server.wait()
        assert process_of(folder) == trainer
        with running(place, port):
            page.reload()
            settled(page)
            expect(page.locator(".ca-standing")).to_contain_text("running")
            page.get_by_role("button", name="Stop after this step").click()
            expect(page.locator(".ca-standing")).to_contain_text("It was stopped; it can go on")
            assert trainer.wait(60) is None  # not our child
            assert not psutil.pid_exists(trainer.pid)
            page.get_by_role("button", name="Go on from the last checkpoint").click()
            expect(page.locator(".ca-standing")).to_contain_text("running")
            resumed = process_of(folder)
            assert resumed is not None
            resumed.kill()
            expect(page.locator(".ca-standing")).to_contain_text("It ended without a word")
    assert [path.name for path in place.glob("runs/long/.*")] == []
    assert runs.standing(folder).state == "failed"
