"""The column "tools": what a chat template is told of them, wherever messages become tokens."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from datasets import Dataset
from helpers.tiny import save_tiny
from helpers.vocabularies import vocabulary

from rlcore.data.encoding import encode_examples, encode_prompts
from rlcore.data.labelled import load_labelled
from rlcore.data.loading import SFT_COLUMNS, load_rows
from rlcore.data.pairs import load_pairs
from rlcore.errors import UserError
from rlcore.sampling import rollout
from rlcore.trainers import PGConfig, train_pg

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = TEMPLATE.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
TALK = [{"role": "user", "content": "x + y"}, {"role": "assistant", "content": "13"}]
OTHER = [{"role": "assistant", "content": "12"}]


def tool(name, **properties):
    function = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function}


TOOLS = [tool("add", x={"type": "number"}), tool("user", y={"type": "number", "minimum": 8})]


@pytest.fixture
def tokenizer():
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def whole(tokenizer, messages, tools=TOOLS, **options):
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)], ids=["schemas", "text"])
def test_messages_are_learned_behind_their_tools(tokenizer, written):
    rows = load_rows([{"messages": TALK, "tools": written}, {"messages": TALK}], SFT_COLUMNS)
    told, untold = encode_examples(tokenizer, rows)
    assert told.prompt + told.completion == whole(tokenizer, TALK)
    assert untold.prompt + untold.completion == whole(tokenizer, TALK, None)
    assert rows["tools"] == [written, None]


def test_prompts_and_completions_are_learned_behind_them(tokenizer):
    row = {"prompt": TALK[:1], "completion": TALK[1:], "tools": TOOLS}
    (example,) = encode_examples(tokenizer, load_rows([row], SFT_COLUMNS))
    assert example.prompt == whole(tokenizer, TALK[:1], add_generation_prompt=True)
    assert example.prompt + example.completion == whole(tokenizer, TALK)
    begun = [*TALK, {"role": "user", "content": "so"}, {"role": "assistant", "content": "x "}]
    row = {"prompt": begun, "completion": OTHER, "tools": TOOLS}
    (example,) = encode_examples(tokenizer, load_rows([row], SFT_COLUMNS))
    ended = [*begun[:-1], {"role": "assistant", "content": "x 12"}]
    assert tokenizer.decode(example.prompt + example.completion) == tokenizer.decode(
        whole(tokenizer, ended)
    )


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistants_turns_are_found_behind_them(tokenizer, template):
    tokenizer.chat_template = template
    rows = load_rows([{"messages": TALK, "tools": TOOLS}], SFT_COLUMNS)
    (example,) = encode_examples(tokenizer, rows, assistant_only=True)
    assert example.prompt == whole(tokenizer, TALK[:1], add_generation_prompt=True)
    assert tokenizer.decode(example.completion) == "13<|im_end|>"


@pytest.mark.parametrize("has_prompt", [True, False])
def test_pairs_and_labelled_completions_have_them(tokenizer, has_prompt):
    row = {"chosen": TALK, "rejected": TALK[:1] + OTHER, "tools": TOOLS}
    if has_prompt:
        row = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER, "tools": TOOLS}
    (pair,) = load_pairs(tokenizer, [row], None)
    good, bad = load_labelled(tokenizer, [row], None)
    assert (pair.chosen, pair.rejected) == (good.example, bad.example)
    assert pair.chosen.prompt == whole(tokenizer, TALK[:1], add_generation_prompt=True)
    assert pair.rejected.prompt + pair.rejected.completion == whole(tokenizer, TALK[:1] + OTHER)


def test_prompts_to_complete_have_them_in_copies_too(tokenizer):
    rows = load_rows([{"prompt": TALK[:1], "tools": TOOLS}, {"prompt": "x", "tools": None}])
    wanted = whole(tokenizer, TALK[:1], add_generation_prompt=True)
    prompts = rows[[0, 1]]["prompt"]
    for each in (prompts, copy.deepcopy(prompts), pickle.loads(pickle.dumps(prompts))):
        assert encode_prompts(tokenizer, each[:1]) == [wanted]
    assert prompts[0] == TALK[:1]
    assert json.loads(json.dumps(prompts)) == [TALK[:1], "x"]


def test_in_tables_a_tool_has_its_own_fields_alone(tokenizer):
    given = [{"messages": TALK, "tools": TOOLS}]
    rows = load_rows(Dataset.from_list(given), SFT_COLUMNS)
    (example,) = encode_examples(tokenizer, rows)
    text = tokenizer.decode(example.prompt + example.completion)
    assert "null" not in text
    assert text.count('"minimum": 8') == 1


@pytest.mark.parametrize("wrong", ["add", 3, ["add"], '{"type": "function"}'])
def test_what_is_no_list_of_schemas_is_refused_with_its_row(wrong):
    rows = [{"messages": TALK}, {"messages": TALK, "tools": wrong}]
    with pytest.raises(UserError, match="row 2: 'tools' must be a list of JSON schemas"):
        load_rows(rows, SFT_COLUMNS)


def test_a_policy_samples_behind_them_from_file_to_token(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "model")
    template = "{{ tools[0].function.name }}{% for m in messages %}{{ m.content }}{% endfor %}="
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "9 + 8"}], "tools": [tool("pears")]})
    )
    seen, encode = [], rollout.encode_prompts

    def spy(tokenizer, prompts, max_length):
        seen.append(prompts)
        assert tokenizer.batch_decode(encode(tokenizer, prompts, max_length))[0] == "pears9 + 8="
        return encode(tokenizer, prompts, max_length)

    def reward(prompts, completions, tools, **columns):
        assert tools[0] == [tool("pears")]
        return [0.0 for _ in prompts]

    monkeypatch.setattr(rollout, "encode_prompts", spy)
    config = PGConfig(
        model=directory,
        dataset=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        chat_template=template,
        max_completion_length=2,
        max_steps=1,
    )
    train_pg(config, reward_funcs=reward)
    assert seen


@pytest.mark.parametrize("load", [load_pairs, load_labelled])
def test_tools_that_the_template_does_not_write_are_told_of(tokenizer, load):
    row = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER, "tools": TOOLS}
    assert not load(tokenizer, [row], None).notes
    text = row | {"prompt": "x", "chosen": "y", "rejected": "z"}
    tokenizer.chat_template = TEMPLATE.partition("<|im_end|>\n{% endif %}")[2]
    assert not load(tokenizer, [text], None).notes
    told = ("the rows have 'tools', of which the chat template writes nothing",)
    assert load(tokenizer, [row], None).notes == told
    rows = load_rows([{"messages": TALK, "tools": TOOLS}], SFT_COLUMNS)
    assert encode_examples(tokenizer, rows).notes == told
