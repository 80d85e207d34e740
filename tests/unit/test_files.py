"""Data files as people have them: read as what they are, or refused with the row or line as it stands in the file."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from d2lora import data
from d2lora.errors import UserError
from d2lora.settings import Data, Model, Task


def refusal(file: Path, **more) -> str:
    with pytest.raises(UserError) as refused:
        data.rows(Data(path=str(file), **more))
    return str(refused.value)


def read(file: Path, text: str, encoding: str = "utf-8") -> list[dict]:
    file.write_bytes(text.encode(encoding))
    return data.rows(Data(path=str(file)))


def test_a_csv_row_with_other_cells_than_the_header_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('q,a\nWhich?,red\n"Two\nlines",x\nMore?,red, maybe blue,green\nFew?\nA,b,\n')
    told = refusal(file)
    assert "the header has 2 cells, row 3 (line 5) has 4, row 4 (line 6) has 1, row 5 (line 7) has 3" in told
    file.write_text("a,b\n" + "1,2,3\n" * 5)
    assert "row 1 (line 2) has 3, row 2 (line 3) has 3, row 3 (line 4) has 3 and 2 more rows" in refusal(file)


def test_an_open_quote_does_not_swallow_the_rows_behind_it(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('q,a\nx,y\nz,"open\nv,w\n')
    assert "not readable as csv (line 3: unexpected end of data)" in refusal(tmp_path / "rows.csv")


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("q,a,q\n1,2,3\n")
    assert "several columns are named 'q'" in refusal(tmp_path / "rows.csv")


def test_a_blank_cell_is_a_null(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.csv", 'q,a\r\nx,\r\n\r\n"",y\r\n') == [{"q": "x", "a": None}, {"q": None, "a": "y"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "q,a\nx,1\n"),
        ("rows.tsv", "q\ta\nx\t1\n"),
        ("rows.json", '[{"q": "x", "a": "1"}]'),
        ("rows.json", '{"version": 2, "data": [{"q": "x", "a": "1"}]}'),
        ("rows.json", '{"q": "x", "a": "1"}'),
        ("rows.jsonl", '{"q": "x", "a": "1"}\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    assert read(tmp_path / name, text, encoding) == [{"q": "x", "a": "1"}]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.json", '{"q": "x"}\n{"q": "y"}\n') == [{"q": "x"}, {"q": "y"}]


def test_a_mapping_of_several_lists_is_no_list_of_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"train": [{"q": "x"}], "test": [{"q": "y"}]}')
    assert "not a list of rows" in refusal(tmp_path / "rows.json")
    (tmp_path / "rows.jsonl").write_text('{"q": "x"}\n[1]\n3\n')
    assert "rows 2, 3: not a list of rows" in refusal(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_broken_lines_are_named_as_in_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"q": "x"}\n\n{"q": "y"\n{"q": "z"}\n{q}\n')
    assert "lines 3, 5: not readable as JSON (Expecting ',' delimiter: column 10" in refusal(tmp_path / name)


def parts(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"i": number}, {"i": -number}]), folder / name)


def test_a_folder_as_the_hub_leaves_it_is_read_whole(tmp_path: Path) -> None:
    one, two = (f"train-{i:05d}-of-00002.parquet" for i in range(2))
    parts(tmp_path / "data", one, two)
    source = Data(path=str(tmp_path))
    assert [row["i"] for row in data.rows(source)] == [0, 0, 1, -1]
    whole = data.identity(source, 0)
    assert whole["content"] not in {data.digest(tmp_path / "data" / name) for name in (one, two)}
    parts(tmp_path / "data", two)
    assert data.identity(source, 0) != whole, "either part changes the key"
    (tmp_path / "data" / one).unlink()
    assert "split train has 1 of 2 parts in data, without 00000" in refusal(tmp_path)


def test_a_single_part_has_the_key_of_its_file(tmp_path: Path) -> None:
    parts(tmp_path / "data", "train-00000-of-00001.parquet")
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    assert data.identity(Data(path=str(tmp_path)), 0) == {"content": data.digest(file)}


def test_a_mistyped_path_is_told_what_lies_beside_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_data").mkdir()
    (tmp_path / "my_data" / "note.jsonl").write_text('{"q": "x"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data.path=my_data/nope.jsonl: no such file; my_data has note.jsonl$"):
        data.identity(Data(path="my_data/nope.jsonl"), 0)
    with pytest.raises(
        UserError, match=r"my_data/nope: no such folder or file here; my_data has note.jsonl; .*revision"
    ):
        data.identity(Data(path="my_data/nope"), 0)
    with pytest.raises(UserError, match=r"model.path=owner/name: a model on the Hub needs a revision"):
        data.model_identity(Model(name="m", path="owner/name"))
    with pytest.raises(UserError, match=r"neither .* Hub name of the form owner/name; my_data has note.jsonl$"):
        data.identity(Data(path="./my_data/nope"), 0)


def test_where_takes_numbers_and_truth_values(tmp_path: Path) -> None:
    found = [{"level": 1, "ok": True}, {"level": 2.0, "ok": False}, {"level": None, "ok": True}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))

    def kept(**where: list) -> list[int]:
        return [found.index(row) for row in data.rows(Data(path=str(tmp_path / "rows.jsonl"), where=where))]

    assert (kept(level=[1]), kept(level=["1", 2]), kept(ok=[True])) == ([0], [0, 1], [0, 2])
    assert "where.level=3: no row has it; there are 1, 2, null" in refusal(
        tmp_path / "rows.jsonl", where={"level": [3]}
    )
    assert data.identity(Data(path=str(tmp_path / "rows.jsonl"), where={"level": [1]}), 0)["where"] == {"level": [1]}


def test_rows_are_numbered_as_in_the_file_whatever_is_chosen_of_them(tmp_path: Path) -> None:
    found = [{"kind": "a" if i % 2 else "b", "q": "x" if i < 6 else None, "a": "y"} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    source = Data(path=str(tmp_path / "rows.jsonl"), where={"kind": ["a"]})
    with pytest.raises(UserError, match=r"rows 8, 10 \(2 of 5\): nothing in column q"):
        data.check_task(Task(name="t", data=source, prompt="{q}", chosen="{a}"), 1, 0)


def test_the_default_of_empty_is_in_no_key(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "x"}\n')
    plain, leaving = (Data(path=str(tmp_path / "rows.jsonl"), empty=e) for e in ("refuse", "leave_out"))
    assert list(data.identity(plain, 0)) == ["content"]
    assert data.identity(leaving, 0)["empty"] == "leave_out"


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_with_semicolons_or_tabs_is_read(tmp_path: Path, mark: str) -> None:
    text = f"q{mark}a\n1,5 eggs?{mark}3\n"
    assert read(tmp_path / "rows.csv", text) == [{"q": "1,5 eggs?", "a": "3"}]


def test_a_file_in_another_encoding_is_told_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("q,a\nCaf\u00e9?,x\n".encode("latin-1"))
    assert refusal(tmp_path / "rows.csv").endswith("rows.csv: not in UTF-8 (byte 8): save it as UTF-8")


def test_long_values_of_a_column_are_named_by_their_beginnings(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i:02d} " + 200 * "x"}) + "\n" for i in range(30)))
    told = refusal(tmp_path / "rows.jsonl", where={"q": ["nope"]})
    assert f"there are 00 {37 * 'x'}..., 01 " in told
    assert told.endswith("... and 6 more")


def test_lists_in_lists_without_end_are_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_text('{"q": ' + "[" * 5_000 + "]" * 5_000 + "}\n")
        assert f"{name}: not readable as json" in refusal(tmp_path / name)


def test_a_folder_that_is_no_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        with pytest.raises(UserError, match=f"model.path={folder}: ") as refused:
            data.check_model(Model(name="mine", path=str(folder), dtype="float32"))
        return str(refused.value)

    assert "no config.json in it" in told(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter, and a base is wanted" in told(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "a file: name the folder" in told(tmp_path / "config.json")
    assert "model.save_pretrained" in told(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "tokenizer.save_pretrained" in told(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    data.check_model(Model(name="mine", path=str(tmp_path), dtype="float32"))
