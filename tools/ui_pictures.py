"""Takes the pictures of docs/ui.md: starts the page on the demo's model in a fresh folder, and uses it in Chromium.

python tools/ui_pictures.py FOLDER [WIDTH] [dark] [--into PICTURES]   # FOLDER is made; a few minutes
"""

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
CHROMIUM = "/usr/bin/chromium"
COADAPT = [sys.executable, "-c", "from coadapt.cli import main; main()"]
QUESTION = "Mia hid the red kite in the barn.\nQ: Where is the kite?\nA:"


def coadapt(folder: Path, *args: str) -> None:
    """Runs a command in `folder`."""
    subprocess.run([*COADAPT, *args], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def fill(page: Page) -> None:
    """The form of the demo's run."""
    page.get_by_label("Model", exact=True).fill("demo-data/base")
    page.get_by_label("Data", exact=True).fill("demo-data/train.jsonl")
    page.get_by_label("Held-out data", exact=True).fill("demo-data/held-out.jsonl")
    page.get_by_label("Learning rate").first.fill("4e-3")
    page.get_by_role("button", name="Add an adapter").click()
    page.get_by_label("num_virtual_tokens").fill("16")
    page.get_by_label("Learning rate").nth(1).fill("1e-2")
    page.get_by_label("Composition").fill("prompt + lora")
    page.get_by_label("or steps").fill("300")
    page.get_by_label("Batch").fill("16")
    page.get_by_label("Name of the run").fill("both")
    page.get_by_role("button", name="More").click()
    page.get_by_label("Steps between evaluations").fill("30")
    page.get_by_role("button", name="More").click()
    expect(page.get_by_text("eval_steps: 30")).to_be_visible()


def shoot(page: Page, name: str, into: Path) -> None:
    """Takes the whole page."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)
    page.screenshot(path=str(into / f"ui-{name}.png"), full_page=True)


def train(page: Page, into: Path) -> None:
    """The form, and the run that it begins."""
    fill(page)
    page.get_by_role("button", name="Estimate").click()
    expect(page.get_by_text("It fits.")).to_be_visible()
    page.get_by_role("button", name="Look at the data").click()
    expect(page.get_by_text("the first 3 rows")).to_be_visible()
    shoot(page, "train", into)
    page.get_by_role("button", name="Start").click()
    expect(page.locator(".ca-standing")).to_contain_text("running")
    expect(page.locator(".ca-standing")).to_contain_text("Step 1", timeout=300_000)  # 1, 10, 100 …
    page.wait_for_function("/Step (1[2-9]|2).\\d/.test(document.querySelector('.ca-said').textContent)")
    shoot(page, "watch", into)
    expect(page.locator(".ca-standing")).to_contain_text("done")


def chat(page: Page, into: Path) -> None:
    """A question to both adapters, and with a quarter of the LoRA."""
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Run, or adapter folder").click()
    page.get_by_role("option", name="both").click()
    page.get_by_role("button", name="Load").click()
    expect(page.get_by_label("number input for gate of lora")).to_be_visible()
    page.get_by_label("The base's answer beside it").check()
    for gate, count in (("1", 1), ("0.25", 2)):
        box = page.get_by_label("number input for gate of lora")
        box.fill(gate)
        box.press("Enter")
        page.get_by_label("Question").fill(QUESTION)
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#ca-base [data-testid=bot]")).to_have_count(count)
        page.wait_for_timeout(5000)
    shoot(page, "chat", into)


def compare(page: Page, into: Path) -> None:
    """Two runs."""
    page.get_by_role("tab", name="Compare").click()
    for name in ("both", "lora"):
        page.get_by_label(f"{name} · done").last.check()
        expect(page.get_by_role("cell", name=name, exact=True).first).to_be_visible()
    expect(page.get_by_text("settings that differ")).to_be_visible()
    shoot(page, "compare", into)


def main(folder: Path, width: int, dark: bool, into: Path) -> None:
    """Makes the folder, serves it, and takes the pictures."""
    folder.mkdir(parents=True)
    coadapt(folder, "demo", "--files-only", "--out", "demo")
    lora = ["adapters.lora.method=lora", "adapters.lora.learning_rate=4e-3", "max_steps=300"]
    lora += ["per_device_train_batch_size=16"]
    data = ["--data", "demo-data/train.jsonl", "--eval-data", "demo-data/held-out.jsonl", "--eval-steps", "30"]
    coadapt(folder, "train", "--model", "demo-data/base", *data, *lora, "--output-dir", "runs/lora")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    server = subprocess.Popen([*COADAPT, "ui", "--port", str(port)], cwd=folder)
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(address).close()
                break
            time.sleep(0.2)
        expect.set_options(timeout=120_000)
        with sync_playwright() as driver:
            window = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            scheme: Any = "dark" if dark else "light"
            page = window.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.set_default_timeout(120_000)
            page.goto(address)
            page.locator(".ca-ready").wait_for(state="attached")
            train(page, into)
            chat(page, into)
            compare(page, into)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    words = sys.argv[1:]
    place = Path(words.pop(words.index("--into") + 1)) if "--into" in words else PICTURES
    widths = [int(word) for word in words if word.isdecimal()]
    main(Path(words[0]), widths[0] if widths else 1280, "dark" in words, place)
