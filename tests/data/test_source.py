"""What is read from files is what stands in them, and what cannot be read is named to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from coadapt.data.source import fingerprint, read

ROWS = [
    {"text": "one", "label": "007"},
    {"text": 'two "quoted", and more', "label": "NA"},
    {"text": "", "label": "None"},
]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, "utf-8")
    return str(folder / name)


@pytest.fixture
def same_rows(tmp_path: Path) -> dict[str, str]:
    """`ROWS` in every kind of file."""
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    tabs = "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS)
    return {
        "csv": write(tmp_path, "a.csv", 'text,label\none,007\n"two ""quoted"", and more",NA\n,None\n'),
        "tsv": write(tmp_path, "a.tsv", "text\tlabel\n" + tabs),
        "jsonl": write(tmp_path, "a.jsonl", "\n".join(json.dumps(r) for r in ROWS)),
        "json": write(tmp_path, "a.json", json.dumps(ROWS, indent=1)),
        "nested json": write(tmp_path, "b.json", json.dumps({"version": "1", "rows": ROWS})),
        "parquet": str(tmp_path / "a.parquet"),
    }


def test_the_same_rows_come_out_of_every_kind_of_file(same_rows: dict[str, str]) -> None:
    read_rows = {kind: read(file).rows.to_list() for kind, file in same_rows.items()}
    assert read_rows == dict.fromkeys(same_rows, ROWS)


def test_the_fingerprint_is_of_the_rows_and_not_of_the_file(same_rows: dict[str, str]) -> None:
    assert len({fingerprint(read(file).rows) for file in same_rows.values()}) == 1
    assert fingerprint(ROWS) != fingerprint(ROWS[::-1])


def test_a_text_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    source = read(write(tmp_path, "a.txt", "one\n\ntwo\n"))
    assert source.document
    assert source.rows.to_list() == [{"text": "one\n\ntwo\n"}]


def test_a_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\ngood,1\ncaf\xe9,2\n")
    with pytest.raises(ValueError, match=r"line 3 has the byte 0xe9 \(byte 21 of the file\)"):
        read(str(tmp_path / "a.csv"))


def test_a_blank_before_a_quote_does_not_hide_the_quote(tmp_path: Path) -> None:
    source = read(write(tmp_path, "a.csv", 'act,prompt\n"A","x, y"\n"B", "z, w"\n'))
    assert source.rows.to_list() == [{"act": "A", "prompt": "x, y"}, {"act": "B", "prompt": "z, w"}]
    assert any("blank" in note for note in source.notes)
    kept = read(write(tmp_path, "b.csv", "act,prompt\nA, leading blank\n"))
    assert kept.rows.to_list() == [{"act": "A", "prompt": " leading blank"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,b\n1,2\n1,2,3,4\n", "line 3"),
        ("a.csv", "a,a\n1,2\n", "name each column once"),
        ("a.json", '{"a": [1,', "not valid JSON"),
        ("a.json", '{"a": [{"x": 1}],\n "b": [{"x": 1}]}', r"fields \['a', 'b'\]"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "cannot be read as json"),
        ("a.csv", "", "is empty"),
        ("a.xml", "<x/>", r"'\.xml' are not read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, text))


def test_a_folder_holds_out_its_own_part_and_says_what_it_leaves(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path, f"{name}.tsv", f"text\n{name}\n")
    source = read(str(tmp_path))
    assert source.rows.to_list() == [{"text": "train"}]
    assert source.held_out is not None
    assert source.held_out.to_list() == [{"text": "dev"}]
    assert "not used: test" in source.notes


def test_a_folder_of_parts_is_read_in_order(tmp_path: Path) -> None:
    for number in (2, 1):
        write(tmp_path, f"part{number}.jsonl", json.dumps({"text": f"row {number}"}))
    assert read(str(tmp_path)).rows["text"][:] == ["row 1", "row 2"]


def test_a_folder_of_datasets_own_format_is_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert read(str(tmp_path / "saved")).rows.to_list() == ROWS


@pytest.mark.parametrize("files", [(), ("a.csv", "a.txt"), ("dev.csv", "test.csv")])
def test_a_folder_that_is_no_data_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    for file in files:
        write(tmp_path, file, "text\nx\n")
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(str(tmp_path))


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "here.csv", "text\nx\n")
    with pytest.raises(FileNotFoundError, match=r"there is: here\.csv"):
        read(str(tmp_path / "their.csv"))


def test_what_is_no_path_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a: asked.append(a) or Dataset.from_list(ROWS))
    assert read("someone/something", "small").rows.to_list() == ROWS
    assert asked == [("someone/something", "small")]


def test_files_with_other_fields_are_told_of_by_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"AddToPlaylist": [{"data": []}]}', "utf-8")
    (tmp_path / "b.json").write_text('{"BookRestaurant": [{"data": []}]}', "utf-8")
    with pytest.raises(ValueError, match="cannot be read as json: not all of them have 'AddToPlaylist'"):
        read(str(tmp_path))
