"""Images and their classes: how they are found in folders and tables, opened, batched; what is left out and refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coadapt.data.columns import Told
from coadapt.data.images import ImageCollator, opened, prepare_images
from coadapt.data.prepare import Plan, plan
from coadapt.data.show import describe, one_image
from coadapt.data.source import Source, read
from pictures import paint, paint_folders, save_seeing_base

TASK = "image-classification"


def found_in(source: Source, held_out: Source | None = None, **told: str) -> Plan:
    return plan(source, held_out, Told(**told), TASK)


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    data = paint_folders(tmp_path, each=3)
    paint(data / "blue" / "deeper" / "4.JPG", "blue", 4)
    paint(data / "loose.png", "red", 0)
    (data / "README.md").write_text("about these images")
    (data / "blue" / "bad.png").write_bytes(b"no image")
    found = found_in(read(str(data)))
    assert (found.form.name, found.classes) == ("image + label", ("blue", "red"))
    made = prepare_images(found, eval_split=0.0, seed=0)
    assert [Path(file).relative_to(data).as_posix() for file in made.train["image"]] == [
        *(f"blue/{n}.png" for n in range(3)),
        "blue/deeper/4.JPG",
        *(f"red/{n}.png" for n in range(3)),
    ]
    assert made.train["labels"] == [0] * 4 + [1] * 3
    assert made.held_out is None
    assert made.tally.dropped == {"no image": 1}
    assert "not used: 1 images in no class's folder" in made.notes
    assert "train: dropped 1 rows (no image): blue/bad.png" in made.notes
    assert "images of 12 x 10 pixels" in made.notes
    assert one_image(made.train[0], found.classes).plain == f"{data}/blue/0.png → ⟦blue⟧"
    assert describe(found, made).row_count == 7


def test_parts_in_folders_of_their_own(tmp_path: Path) -> None:
    paint_folders(tmp_path / "train", each=2)
    paint_folders(tmp_path / "test", each=1)
    made = prepare_images(found_in(read(str(tmp_path))), eval_split=0.5, seed=0)
    assert made.held_out is not None
    assert (len(made.train), made.held_out["image"]) == (4, [f"{tmp_path}/test/{c}/0.png" for c in ("blue", "red")])
    # A class can be called "train".
    paint(tmp_path / "other" / "train" / "0.png", "red", 0)
    paint(tmp_path / "other" / "plane" / "0.png", "blue", 0)
    assert found_in(read(str(tmp_path / "other"))).classes == ("plane", "train")


def test_a_table_that_names_files(jsonl: Any, tmp_path: Path) -> None:
    paint_folders(tmp_path / "pixels", each=2)
    rows = [{"image": f"pixels/{c}/{n}.png", "label": c} for c in ("red", "blue") for n in range(2)]
    lost = {"image": "pixels/red/9.png", "label": "red"}
    made = prepare_images(found_in(read(jsonl(*rows, lost))), eval_split=0.0, seed=0)
    assert made.train["labels"] == [1, 1, 0, 0]
    assert made.tally.dropped == {"no such file": 1}
    table = tmp_path / "elsewhere" / "rows.csv"
    table.parent.mkdir()
    table.write_text("photo,kind\n../pixels/red/0.png,red\n../pixels/blue/0.png,blue\n")
    same = found_in(read(str(table)), image="photo", label="kind")
    held = found_in(read(str(tmp_path / "pixels")), read(str(tmp_path / "pixels")))
    assert len(prepare_images(same, eval_split=0.0, seed=0).train) == 2
    assert len(prepare_images(held, eval_split=0.0, seed=0).held_out or []) == 4
    with pytest.raises(ValueError, match=r"None of the 1 rows has an image .*no such file.* relative to .*elsewhere"):
        table.write_text("image,label\nno.png,red\n")
        found = plan(read(jsonl(*rows)), read(str(table)), Told(), TASK)
        prepare_images(found, eval_split=0.0, seed=0)


def test_other_images_under_the_same_names_are_other_data(tmp_path: Path) -> None:
    found = found_in(read(str(paint_folders(tmp_path, each=1))))
    before = prepare_images(found, eval_split=0.0, seed=0).fingerprint
    assert prepare_images(found, eval_split=0.0, seed=0).fingerprint == before
    paint(tmp_path / "red" / "0.png", "red", seed=5)
    assert prepare_images(found, eval_split=0.0, seed=0).fingerprint != before


def test_a_batch_is_what_the_model_s_processor_makes_of_the_pixels(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(save_seeing_base(tmp_path / "base"))
    file = tmp_path / "8.png"
    paint(file, "red", 0, size=(8, 8))
    batch = ImageCollator(processor=processor)([{"image": str(file), "labels": 1}] * 2)
    pixels = torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1) / 255  # (3, H, W)
    assert batch["labels"].tolist() == [1, 1]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert torch.allclose(batch["pixel_values"][1], (pixels - 0.5) / 0.5, atol=1e-6)


def test_whatever_the_file_holds_an_image_is_red_green_and_blue(tmp_path: Path) -> None:
    for mode, value, seen in (
        ("L", 7, (7, 7, 7)),
        ("RGBA", (9, 9, 9, 0), (255, 255, 255)),
        ("LA", (9, 255), (9, 9, 9)),
        ("1", 1, (255, 255, 255)),
    ):
        file = tmp_path / f"{mode}.png"
        Image.new(mode, (2, 3), value).save(file)
        image = opened(file)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (2, 3), seen), mode
    turned = Image.new("RGB", (2, 3))
    exif = turned.getexif()
    exif[274] = 6  # held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert opened(tmp_path / "turned.jpg").size == (3, 2)
    whole = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read as an image"):
        opened(tmp_path / "cut.jpg")
    with pytest.raises(FileNotFoundError, match="There is no image"):
        opened(tmp_path / "nowhere.png")


def test_what_is_no_data_of_images_is_refused(jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must hold paths of image files"):
        found_in(read(jsonl({"image": 1, "label": "a"}, {"image": 2, "label": "b"})))
    with pytest.raises(ValueError, match="the path of an image and its label"):
        found_in(read(jsonl({"a": "x", "b": "y"}, name="other.jsonl")))
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match="nor a folder of images for each class"):
        read(str(tmp_path / "empty"))
    paint(tmp_path / "one" / "red" / "0.png", "red", 0)
    with pytest.raises(ValueError, match="fewer than two classes"):
        found_in(read(str(tmp_path / "one")))
    found = found_in(read(str(paint_folders(tmp_path / "two", each=1))))
    monkeypatch.setitem(sys.modules, "PIL", None)  # as Python says itself that there is no such module
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError, match=r"not installed\. Run: pip install pillow"):
        prepare_images(found, eval_split=0.0, seed=0)
