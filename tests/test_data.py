"""Reading rows, tokenizing them, and padding them into batches."""

from __future__ import annotations

import copy
import json

import pytest
from helpers.tiny import tiny_tokenizer

from rlcore.data.encoding import Example, collate, encode_examples, encode_prompts, pad
from rlcore.data.loading import SFT_COLUMNS, load_rows
from rlcore.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = [{"role": "user", "content": "7"}]
ANSWER = [{"role": "assistant", "content": "8"}]


def write(path, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.fixture
def chat_tokenizer():
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_jsonl_rows_keep_their_columns_and_skip_blank_lines(file):
    path = write(file, {"prompt": "a", "answer": 1}, "", {"prompt": "b", "answer": 2})
    rows = load_rows(path)
    assert rows.column_names == ["prompt", "answer"]
    assert rows[[1, 0]] == {"prompt": ["b", "a"], "answer": [2, 1]}


def test_prompts_of_text_and_of_messages_stand_in_one_file(file):
    assert load_rows(write(file, {"prompt": "a"}, {"prompt": QUESTION}))["prompt"] == [
        "a",
        QUESTION,
    ]


def test_a_column_that_only_later_rows_have_is_none_before(file):
    rows = load_rows(write(file, {"prompt": "a"}, {"prompt": "b", "level": 3}))
    assert rows["level"][:] == [None, 3]


@pytest.mark.parametrize(
    "second_line, message",
    [
        ('{"prompt": "b"', "rows.jsonl, line 2, column 15: not JSON: Expecting ',' delimiter$"),
        ("[1, 2]", "rows.jsonl, line 2: a row must be a JSON object, not list"),
        ({"question": "b"}, r"line 2: needs the column 'prompt'; columns found: 'question'"),
        ({"prompt": None}, "line 2: needs the column 'prompt'"),
        ({"prompt": 3}, "line 2: 'prompt' must be text or a list of messages"),
        ({"prompt": []}, "line 2: 'prompt' must be text or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "line 2: 'prompt' must be text or a list of messages"),
    ],
)
def test_a_bad_line_is_named_with_its_number(file, second_line, message):
    with pytest.raises(UserError, match=message):
        load_rows(write(file, {"prompt": "a"}, second_line))


def test_a_missing_file_an_empty_one_and_another_encoding_are_clear_errors(tmp_path, file):
    with pytest.raises(UserError, match=r"no data file at .*absent.jsonl"):
        load_rows(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="has no rows"):
        load_rows(write(file, ""))
    file.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        load_rows(str(file))


def test_several_column_groups_let_the_first_row_decide(file):
    text, pair = {"text": "a"}, {"prompt": "a", "completion": "b"}
    assert load_rows(write(file, text, text), SFT_COLUMNS).column_names == ["text"]
    with pytest.raises(UserError, match="line 2: needs the column 'text'"):
        load_rows(write(file, text, pair), SFT_COLUMNS)
    with pytest.raises(UserError, match="'prompt' \\+ 'completion' or 'text' or 'messages'"):
        load_rows(write(file, {"prompt": "a"}), SFT_COLUMNS)


def test_csv_files_load_and_their_rows_are_checked_too(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer\na,1\n,2\n")
    with pytest.raises(UserError, match="row 2: needs the column 'prompt'"):
        load_rows(str(path))
    path.write_text("prompt,answer\na,1\nb,2\n")
    assert load_rows(str(path))[[0]] == {"prompt": ["a"], "answer": [1]}


def test_a_dataset_that_is_not_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "absent.csv"), str(tmp_path / "absent")):
        with pytest.raises(UserError, match="cannot load the dataset"):
            load_rows(name)


def test_prompts_encode_as_text_or_through_the_chat_template(chat_tokenizer):
    ids = encode_prompts(chat_tokenizer, ["7", QUESTION, "8 9"], max_length=4)
    assert ids[0] == chat_tokenizer("7")["input_ids"]
    assert ids[1] == chat_tokenizer("<user>7</><assistant>")["input_ids"][-4:]
    assert chat_tokenizer.decode(ids[2]) == "8 9"


def test_chat_messages_need_a_chat_template():
    with pytest.raises(UserError, match="no chat template"):
        encode_prompts(tiny_tokenizer(), [QUESTION])


def encoded(tokenizer, file, *rows, **options) -> list[tuple[str, str]]:
    """The rows' (prompt, completion) as they come out of their tokens."""
    examples = encode_examples(tokenizer, load_rows(write(file, *rows), SFT_COLUMNS), **options)
    return [(tokenizer.decode(e.prompt), tokenizer.decode(e.completion)) for e in examples]


def test_a_column_that_other_rows_have_does_not_change_what_is_learned(file):
    rows = [{"text": "7+1=8"}, {"text": "2", "prompt": "1", "completion": "3"}]
    assert encoded(tiny_tokenizer(), file, *rows)[0] == ("7", "+1=8<|endoftext|>")


def test_completions_end_with_eos(file):
    pairs = encoded(tiny_tokenizer(), file, {"prompt": "7+1", "completion": "=8"})
    assert pairs == [("7+1", "=8<|endoftext|>")]


def test_text_is_learned_from_its_second_token_on(file):
    assert encoded(tiny_tokenizer(), file, {"text": "7+1=8"}) == [("7", "+1=8<|endoftext|>")]


def test_chat_rows_are_split_where_the_answer_starts(file, chat_tokenizer):
    rows = {"prompt": QUESTION, "completion": ANSWER}
    assert encoded(chat_tokenizer, file, rows) == [("<user>7</><assistant>", "8</>")]
    rows = {"messages": QUESTION + ANSWER}
    assert encoded(chat_tokenizer, file, rows) == [("<", "user>7</><assistant>8</>")]


def test_a_template_that_rewrites_the_prompt_is_refused(file, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(UserError, match="chat template writes the prompt differently"):
        encoded(chat_tokenizer, file, {"prompt": QUESTION, "completion": ANSWER})


def test_long_rows_are_cut_and_those_without_a_completion_drop_out(file):
    rows = [{"prompt": "123", "completion": "4567"}, {"prompt": "12345", "completion": "6"}]
    assert encoded(tiny_tokenizer(), file, *rows, max_length=5) == [("123", "45")]
    nothing = r"no row is left: of 2 rows 2 are left out: max_length 3 .*\(the first: .*line 1\)"
    with pytest.raises(UserError, match=nothing):
        encoded(tiny_tokenizer(), file, *rows, max_length=3)


def test_special_tokens_of_the_tokenizer_open_text_prompts_only(file, chat_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    text, chat = encode_prompts(tokenizer, ["7", QUESTION])
    assert text[0] == 0 and 0 not in text[1:]
    assert 0 not in chat
    pairs = encoded(tokenizer, file, {"prompt": "7", "completion": "8"})
    assert pairs == [("<|endoftext|>7", "8<|endoftext|>")]


def test_padding_goes_on_the_side_asked_for():
    assert pad([[1], [2, 3]], 0, "left").tolist() == [[0, 1], [2, 3]]
    assert pad([[1], [2, 3]], 0, "right").tolist() == [[1, 0], [2, 3]]


def test_a_batch_pads_prompts_left_and_completions_right():
    batch = collate([Example([1], [2, 3, 4]), Example([5, 6], [7])], pad_token_id=0)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.target.tolist() == [[2, 3, 4], [7, 0, 0]]
