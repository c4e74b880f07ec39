"""Values of data files arrive as they stand there, whatever the file's type."""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import json
import lzma
from pathlib import Path

import pandas
import pytest
from helpers.tiny import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.data.encoding import encode_examples
from rlcore.data.loading import PREFERENCE_COLUMNS, SFT_COLUMNS, load_rows
from rlcore.errors import UserError

ROME = {"role": "assistant", "content": None, "tool_calls": [{"arguments": {"city": "Rome"}}]}
ONE = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"x": 1}}]}
USER = {"role": "user", "content": "7"}
# what a table would unify: keys, types, dates, integers that no machine word holds
ROWS = [
    {"prompt": "a", "call": {"x": 1}, "mixed": 1, "when": "2024-01-01", "big": 2**70, "deep": [[]]},
    {"prompt": [USER, ROME], "call": {"city": "Rome"}, "mixed": 1.0, "when": "01", "deep": [[1]]},
    {
        "prompt": [USER, ONE],
        "call": None,
        "mixed": "1",
        "when": None,
        "big": -1,
        "deep": [["1", {}]],
    },
    {"prompt": "b", "call": [{"y": None}], "mixed": [True], "when": "NA", "big": 0.5, "deep": {}},
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


WRITERS = {
    "rows.jsonl": lines,
    "rows.JSONL": lines,
    "rows.ndjson": lines,
    "rows.json": json.dumps,
    "lines.json": lines,
    "pretty.json": lambda rows: json.dumps(rows, indent=2),
    "objects.JSON": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "rows.jsonl.gz": lines,
    "rows.json.xz": json.dumps,
    "rows.ndjson.BZ2": lines,
}
COMPRESSIONS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def write(path: Path, text: str | bytes) -> str:
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(COMPRESSIONS.get(path.suffix.lower(), bytes)(data))
    return str(path)


def same(one, two) -> bool:
    """Equal, and of the same types: in Python 1 == 1.0 == True."""
    return repr(one) == repr(two)


@pytest.mark.parametrize("name", WRITERS)
def test_values_of_json_arrive_as_they_are_whatever_the_files_ending(tmp_path, name):
    rows = load_rows(write(tmp_path / name, WRITERS[name](ROWS)))
    assert same(list(rows), ROWS)
    for column in ("call", "mixed", "when", "big", "deep"):
        expected = [row.get(column) for row in ROWS]
        assert same(rows[column], expected)
        assert same(rows[[3, 0, 2, 1]][column], [expected[place] for place in (3, 0, 2, 1)])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": st.text(), "value": JSON_VALUES}), min_size=1)
)
def test_any_json_value_comes_back_as_it_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for name in ("rows.jsonl", "rows.json"):
        assert same(list(load_rows(write(folder / name, WRITERS[name](rows)))), rows)


def test_a_directory_of_json_files_gives_what_the_files_hold(tmp_path):
    write(tmp_path / "train-0.jsonl", lines(ROWS[:3]))
    write(tmp_path / "train-1.jsonl", lines(ROWS[3:]))
    rows = load_rows(str(tmp_path))
    assert same(list(rows), ROWS)
    assert rows.where(3) == f"{tmp_path}/train-1.jsonl, line 1"


def test_rows_give_columns_slices_and_places(tmp_path):
    rows = load_rows(write(tmp_path / "rows.jsonl", "\n" + lines(ROWS)))
    assert (len(rows), rows.column_names) == (4, [*ROWS[0]])
    assert rows[1:3]["mixed"] == rows[[1, 2]]["mixed"] == [1.0, "1"]
    assert rows[-1] == ROWS[-1] and "big" not in rows[1]
    chosen = rows.select_columns(["when", "prompt"])
    assert chosen.column_names == ["when", "prompt"]
    assert chosen[0] == {"when": "2024-01-01", "prompt": "a"}
    assert [rows.where(0), rows.where(3)] == [f"{tmp_path}/rows.jsonl, line {n}" for n in (2, 5)]


def test_what_a_reward_does_to_its_columns_stays_there(tmp_path):
    rows = load_rows(write(tmp_path / "rows.jsonl", lines(ROWS)))
    rows[[0, 1]]["call"][0].clear()
    assert rows[[0]]["call"] == [{"x": 1}]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    mark = b"\xef\xbb\xbf"
    for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz"):
        path = write(tmp_path / name, mark + WRITERS[name](ROWS).encode())
        assert same(list(load_rows(path)), ROWS)
    assert load_rows(write(tmp_path / "rows.csv", mark + b"prompt\na\n")).column_names == ["prompt"]


def test_csv_cells_become_numbers_only_where_that_keeps_their_text(tmp_path):
    columns = {
        "prompt": ["1", "2", "3"],
        "int": ["1", "", "-20"],
        "big": [str(2**70), "0", "1"],
        "float": ["1.5", "2", ""],
        "code": ["007", "1", "2"],
        "price": ["1.50", "2.25", "3.00"],
        "word": ["NA", "null", "None"],
        "truth": ["True", "false", ""],
        "none": ["nan", "inf", "1"],
        "lines": ["a\r\nb", 'say "hi", twice', "c\n"],
    }
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    rows = load_rows(str(tmp_path / "rows.csv"))
    expected = columns | {
        "int": [1, None, -20],
        "big": [2**70, 0, 1],
        "float": [1.5, 2, None],
        "truth": [True, False, None],
    }
    assert same({name: rows[name] for name in columns}, expected)


def test_answers_in_a_csv_file_are_text_even_where_they_are_numbers(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt,completion,chosen,rejected\n1,2,3,4\n")
    assert load_rows(path, SFT_COLUMNS)["completion"] == ["2"]
    assert load_rows(path, PREFERENCE_COLUMNS)["chosen"] == ["3"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("rows.csv", 'prompt\n"a\nb\n', "rows.csv, line 3: not CSV: unexpected end of data"),
        ("rows.csv", "prompt,answer\na,1\nb,2,3\n", "row 2: 3 cells, but the header names 2"),
        ("rows.csv", "prompt,answer\na,1\nb\n", "row 2: 1 cells, but the header names 2"),
        ("rows.csv", "prompt,prompt\na,b\n", "the header names the column 'prompt' twice"),
        ("rows.json", '[{"prompt": "a"}', "rows.json: not JSON: .*line 1"),
        ("rows.json", '{"prompt": "a"}\n{"prompt"}', "rows.json: not JSON: .*line 2"),
        ("rows.json", '["a"]', "rows.json, row 1: a row must be a JSON object, not str"),
        ("rows.jsonl", '{"prompt": ' + "[" * 10**5, "line 1: not JSON"),
        ("rows.jsonl.gz", b"", None),
        ("rows.txt", "a", r"'.*rows.txt': a file's name must end in one of .jsonl, .ndjson"),
        ("rows.parquet", "a", r"cannot load the dataset '.*rows.parquet': .*[Pp]arquet"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_clear_error(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    if message is None:
        Path(path).write_bytes(gzip.compress(lines(ROWS).encode())[:-9])
        message = "rows.jsonl.gz: cannot be read"
    with pytest.raises(UserError, match=message):
        load_rows(path)


@pytest.mark.parametrize("second", [{"prompt": "b", "completion": None}, {"completion": None}])
def test_a_null_completion_is_named_as_such_with_its_row(tmp_path, second):
    rows = [{"prompt": "a", "completion": "b"}, second]
    path = write(tmp_path / "rows.jsonl", lines(rows))
    with pytest.raises(UserError, match=r"line 2: needs .*'completion'; 'completion' is null"):
        load_rows(path, SFT_COLUMNS)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_messages_of_a_table_lose_the_fields_that_the_table_added(tmp_path, ending):
    from datasets import Dataset

    chats = [[USER, ROME], [USER, ONE], [USER, {"role": "assistant", "content": "8"}]]
    rows = [{"messages": chat, "call": {"x": 1}} for chat in chats]
    data = Dataset.from_list([*rows, {"messages": [USER], "call": {"city": "Rome"}}])
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    loaded = load_rows(str(path), SFT_COLUMNS)
    assert same(loaded["messages"], [*chats, [USER]])
    # elsewhere nobody can tell a null that was meant from one that was not: it stays, and is said
    assert loaded["call"][0] == {"x": 1, "city": None}
    assert loaded.null_fields == ("call",)
    assert same(load_rows(str(path), SFT_COLUMNS)[[1]]["messages"], [chats[1]])


TOOLS = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls[0].arguments | tojson }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_tool_call_is_learned_with_its_own_arguments_alone(tmp_path, name):
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = TOOLS
    rows = [{"messages": [USER, ROME]}, {"messages": [USER, ONE]}]
    path = str(tmp_path / name)
    if name.endswith("parquet"):
        pandas.DataFrame(rows).to_parquet(path)
    else:
        write(tmp_path / name, WRITERS[name](rows))
    examples = encode_examples(tokenizer, load_rows(path, SFT_COLUMNS))
    texts = [tokenizer.decode(each.prompt + each.completion) for each in examples]
    assert texts == ['7{"city": "Rome"}', '7{"x": 1}']


def test_objects_of_a_table_without_nulls_are_not_said_to_have_some(tmp_path):
    frame = pandas.DataFrame({"prompt": ["a", "b"], "call": [{"x": 1, "y": [{"z": 2}]}, None]})
    frame.to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    assert rows.null_fields == ()
    assert rows[[0, 1]]["call"] == [{"x": 1, "y": [{"z": 2}]}, None]
    with pytest.raises(UserError, match=r"rows.parquet, row 1: needs the column 'text'"):
        load_rows(str(tmp_path / "rows.parquet"), ("text",))


def test_a_librarys_error_is_shown_whole_with_its_cause(tmp_path, monkeypatch):
    import datasets

    def fails(*_, **__):
        try:
            raise ValueError("Column(answer) changed\n from string")
        except ValueError as error:
            raise RuntimeError("the first line:\nthe second one") from error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    path = write(tmp_path / "rows.parquet", "")
    message = "'.*rows.parquet': the first line: the second one: Column\\(answer\\) changed from"
    with pytest.raises(UserError, match=message):
        load_rows(path)


def splits(folder, **rows) -> str:
    for split, names in rows.items():
        frame = pandas.DataFrame({"prompt": list(names)})
        frame.to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    "there, trained, held_out",
    [
        ({"train": "abc", "test": "de"}, "abc", "de"),
        ({"train": "abc", "test": "de", "validation": "fg"}, "abc", "fg"),
        ({"train": "abc"}, "abc", "abc"),
        ({"test": "de"}, "de", "de"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_training_takes_the_train_split_and_evaluation_another(
    tmp_path, kind, there, trained, held_out
):
    path = splits(tmp_path, **there)
    if kind == "jsonl":
        for file in tmp_path.glob("*.parquet"):
            pandas.read_parquet(file).to_json(
                file.with_suffix(".jsonl"), orient="records", lines=True
            )
            file.unlink()
    assert "".join(load_rows(path)["prompt"]) == trained
    rows = load_rows(path, held_out=True)
    assert "".join(rows["prompt"]) == held_out
    (note,) = rows.notes
    taken = next(split for split, names in there.items() if names == held_out)
    assert note == f"{path}: the {len(held_out)} rows of its split '{taken}'"


def test_a_directory_whose_splits_have_other_names_is_refused_with_their_names(tmp_path):
    path = splits(tmp_path, test="a", validation="b")
    with pytest.raises(UserError, match=r"has the splits .*, and none of them is called train"):
        load_rows(path)
