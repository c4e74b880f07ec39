"""SFT on data that is read as it is needed: the same examples, in an order of the seed."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Json, List, Value
from helpers.tiny import most_of, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from rlcore.data.encoding import encode_examples
from rlcore.data.loading import SFT_COLUMNS, load_rows
from rlcore.data.streaming import Stream
from rlcore.data.tools import tools_of
from rlcore.errors import UserError
from rlcore.runs.tracking import read_metrics
from rlcore.trainers.sft import SFTConfig, train_sft

COUNT = 40


@pytest.fixture
def path(tmp_path):
    rows = [{"prompt": f"{n} pears", "completion": f"{n} + {n} coins"} for n in range(COUNT)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def config(path, tmp_path):
    return SFTConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(path),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        streaming=True,
        shuffle_buffer_size=16,
    )


def stream(source, **options):
    encode = partial(encode_examples, tiny_tokenizer(), max_length=None, may_be_empty=True)
    return Stream(source, SFT_COLUMNS, encode, **{"buffer_size": 16, "seed": 0} | options)


def as_text(examples):
    return [tiny_tokenizer().decode(each.completion) for each in examples]


def drawn(source, count, **options):
    return [example for _, example in itertools.islice(stream(source, **options), count)]


def test_an_epoch_has_every_example_once_in_an_order_of_the_seed(path):
    whole = as_text(encode_examples(tiny_tokenizer(), load_rows(str(path), SFT_COLUMNS)))
    two = as_text(drawn(str(path), 2 * COUNT))
    first, second = two[:COUNT], two[COUNT:]
    assert Counter(first) == Counter(second) == Counter(whole)
    assert first != whole and first != second
    assert as_text(drawn(str(path), 2 * COUNT)) == two
    assert as_text(drawn(str(path), COUNT, seed=1)) != first
    assert as_text(drawn(str(path), COUNT, buffer_size=1)) == whole
    # an example comes no earlier than the buffer reaches
    assert all(whole.index(text) <= place + 16 for place, text in enumerate(first))
    epochs = [epoch for epoch, _ in itertools.islice(stream(str(path)), 2 * COUNT + 1)]
    assert epochs == [0] * COUNT + [1] * COUNT + [2]


def test_no_more_is_read_than_is_needed():
    asked = []

    def rows():
        for number in range(10**9):
            asked.append(number)
            yield {"prompt": f"{number} pears", "completion": "7"}

    # in pieces, as they are tokenized together
    assert len(drawn(IterableDataset.from_generator(rows), 20)) == 20
    assert len(asked) <= 1100


@pytest.mark.parametrize("kind", ["gz", "parquet", "directory", "several", "object", "columns"])
def test_sources_give_the_examples_that_they_give_when_read_whole(path, tmp_path, kind):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    source, column = str(path), "prompt"
    if kind == "gz":
        source = str(tmp_path / "rows.jsonl.gz")
        Path(source).write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "parquet":
        source = str(tmp_path / "rows.parquet")
        Dataset.from_list(rows).to_parquet(source)
    elif kind == "directory":
        (tmp_path / "data").mkdir()
        Dataset.from_list(rows).to_parquet(str(tmp_path / "data" / "train.parquet"))
        source = str(tmp_path / "data")
    elif kind == "several":
        (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y"}))
        source = [str(path), str(tmp_path / "more.jsonl")]
    elif kind == "object":
        source = IterableDataset.from_generator(lambda: iter(rows))
    else:
        column = "question"
        renamed = [{"question": row["prompt"], "completion": row["completion"]} for row in rows]
        path.write_text("\n".join(map(json.dumps, renamed)))
    whole = Dataset.from_list(rows) if kind == "object" else source
    wanted = encode_examples(
        tiny_tokenizer(), load_rows(whole, SFT_COLUMNS, prompt_column=column), None
    )
    found = drawn(source, len(wanted), buffer_size=1, prompt_column=column)
    assert found == list(wanted)


def test_in_tables_messages_have_their_own_fields_alone(tmp_path):
    talk = [{"role": "user", "content": "x", "name": "Ana"}, {"role": "assistant", "content": "y"}]
    Dataset.from_list([{"messages": talk}]).to_parquet(str(tmp_path / "rows.parquet"))
    tokenizer = tiny_tokenizer().__class__.from_pretrained(save_tiny(tmp_path / "model"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.keys() | list | length }}{% endfor %}"
    encode = partial(encode_examples, tokenizer, max_length=None, may_be_empty=True)
    rows = Stream(str(tmp_path / "rows.parquet"), SFT_COLUMNS, encode, buffer_size=1, seed=0)
    _, example = next(iter(rows))
    assert tokenizer.decode(example.prompt + example.completion) == "32"


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize("typed", [False, True])
def test_tools_have_the_fields_that_they_have_when_read_whole(tmp_path, typed):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = ([{"name": "f", "default": None}], [{"name": "g", "other": 1}])
    message = {"role": Value("string"), "content": Value("string")}
    # a column of JSON has the nulls that somebody wrote, a column of structs those of its type too
    features = Features({"messages": List(message), "tools": Json()}) if typed else None
    data = [{"messages": talk, "tools": each} for each in tools]
    Dataset.from_list(data, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    source, streamed = str(tmp_path / "rows.parquet"), []

    def encode(rows):
        streamed.extend(tools_of(row["messages"]) for row in rows)
        return encode_examples(tiny_tokenizer(), load_rows(str(plain), SFT_COLUMNS))

    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "3 pears"}')
    Stream(source, SFT_COLUMNS, encode, buffer_size=1, seed=0).first()
    assert streamed == [tools_of(row["messages"]) for row in load_rows(source, SFT_COLUMNS)]
    assert streamed[0] == ([{"name": "f", "default": None}] if typed else [{"name": "f"}])


def test_a_run_learns_and_a_resumed_one_ends_where_an_unbroken_one_does(config, tmp_path):
    config = dataclasses.replace(config, lr_scheduler_type="constant", save_steps=3)
    result = train_sft(config)
    lines = read_metrics(result.output_dir / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    # 40 rows in batches of 8
    assert [line["epoch"] for line in lines] == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    train_sft(dataclasses.replace(halves, max_steps=3))
    train_sft(dataclasses.replace(halves, resume=True))
    for name, value in weights(config.output_dir).items():
        assert torch.equal(value, weights(halves.output_dir)[name]), name
    with pytest.raises(UserError, match="shuffle_buffer_size"):
        train_sft(dataclasses.replace(halves, max_steps=7, resume=True, shuffle_buffer_size=8))


def test_it_is_evaluated_on_data_that_is_read_whole(config):
    result = train_sft(dataclasses.replace(config, eval_dataset=most_of(config.dataset)))
    assert result.metrics["eval/loss"] > 0


def test_an_iterable_dataset_may_be_given(config):
    rows = [{"text": f"{n} pears"} for n in range(9)]
    config = dataclasses.replace(config, dataset=None, max_steps=2)
    train_sft(config, dataset=IterableDataset.from_generator(lambda: iter(rows)))
    with pytest.raises(UserError, match="IterableDataset: say streaming"):
        train_sft(
            dataclasses.replace(
                config, streaming=False, shuffle_buffer_size=1024, overwrite_output_dir=True
            ),
            dataset=IterableDataset.from_generator(lambda: iter(rows)),
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_steps": -1}, r"streaming does not count rows.*max_steps"),
        ({"streaming": False}, "shuffle_buffer_size is set, but"),
        ({"dataset": "/nowhere/rows.jsonl"}, "no data file"),
        ({"dataset": "/nowhere/rows.csv"}, r"streaming reads \.jsonl, \.ndjson"),
    ],
)
def test_options_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        train_sft(dataclasses.replace(config, **changes))
    assert not Path(config.output_dir).exists()


def test_a_first_row_that_cannot_work_is_refused_before_training(config, path):
    path.write_text(json.dumps({"question": "x"}))
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: needs the column 'prompt'"):
        train_sft(config)
    path.write_text(json.dumps({"text": ""}))
    with pytest.raises(UserError, match="no row is left"):
        train_sft(config)
    assert not Path(config.output_dir).exists()


def test_a_later_row_that_cannot_work_ends_the_run_by_its_line(config, path):
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows * 30, "{"]))
    with pytest.raises(UserError, match=r"rows.jsonl, line 1201, column"):
        train_sft(dataclasses.replace(config, max_steps=200))


def test_sequences_too_long_for_the_model_are_noticed_wherever_they_are(config, path):
    rows = path.read_text().splitlines()
    long = json.dumps({"prompt": "x", "completion": "7" * 100})
    path.write_text("\n".join([*rows * 30, long]))
    with pytest.raises(UserError, match=r"line 1201: \d+ tokens, but .* has 64 positions"):
        train_sft(dataclasses.replace(config, max_steps=200))
