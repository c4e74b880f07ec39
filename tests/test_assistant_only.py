"""Loss on the assistant's turns alone: which tokens count, what a cut leaves, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_tiny, tiny_tokenizer
from helpers.vocabularies import TEMPLATES, VOCABULARIES, vocabulary
from transformers import AutoModelForCausalLM

from rlcore.data.encoding import collate, encode_examples
from rlcore.data.loading import SFT_COLUMNS, load_rows
from rlcore.errors import UserError
from rlcore.trainers.sft import SFTConfig, train_sft

ADAMW_STEP = torch.optim.AdamW.step
CHATML = TEMPLATES["chatml"][0]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "x = 1 and y = 12"},
    {"role": "assistant", "content": "9+8=17"},
    {"role": "user", "content": "17+8"},
    {"role": "assistant", "content": "The answer is 25"},
    {"role": "user", "content": "so x + y"},
]


def encoded(tokenizer, *conversations, max_length=None):
    rows = load_rows([{"messages": talk} for talk in conversations], SFT_COLUMNS)
    return encode_examples(tokenizer, rows, max_length, assistant_only=True)


def learned(example):
    """The runs of the completion's tokens that count, one after another."""
    runs, before = [], False
    counts = example.learned or [True] * len(example.completion)
    for token, count in zip(example.completion, counts, strict=True):
        if count and not before:
            runs.append([])
        if count:
            runs[-1].append(token)
        before = count
    return runs


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_counts_is_each_answer_and_the_end_of_its_turn(name, template):
    known = vocabulary(name)
    tokenizer = known.with_template(template)
    (example,) = encoded(tokenizer, TALK)
    end = TEMPLATES[template][1]
    spelled = [known.spell(run) for run in learned(example)]
    blank = " " if template == "llama2" else ""
    wanted = [f"{blank}9+8=17{blank}{end}", f"{blank}The answer is 25{blank}{end}"]
    if known.keeps_blanks and not (known.dummy and blank):
        # a tokenizer may write a blank of its own behind a special token
        assert [text.removeprefix(known.dummy) for text in spelled] == wanted
    for text, want in zip(spelled, wanted, strict=True):
        assert "".join(text.split()) == "".join(want.split())
    # together these are the tokens of the conversation, without what follows the last answer
    ids = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert example.prompt + example.completion == ids[: len(example)]


def test_what_a_template_marks_as_generated_counts():
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.chat_template = CHATML
    (plain,) = encoded(tokenizer, TALK)
    tokenizer.chat_template = MARKED
    (marked,) = encoded(tokenizer, TALK)
    assert marked == plain
    tokenizer.chat_template = MARKED.replace(
        "{{ m.content }}<|im_end|>{% end", "{{ m.content }}{% end"
    )
    (bare,) = encoded(tokenizer, TALK)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [run[-1] for run in learned(plain)] == [end, end]
    assert learned(bare) == [run[:-1] for run in learned(plain)]


def test_marks_agree_with_the_tokenizers_own_mask():
    tokenizer = vocabulary("metaspace first, bos").tokenizer
    tokenizer.chat_template = MARKED
    (example,) = encoded(tokenizer, TALK)
    theirs = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    start = len(example.prompt)
    assert example.prompt + example.completion == ids[: len(example)]
    assert [int(count) for count in example.learned] == mask[start : len(example)]
    assert sum(mask) == example.num_learned


# what such a template writes before the words of the last turn alone, and what it asks with
THOUGHTS = [("<t></t>", ""), ("<t>x</t>", "<t>")]


@pytest.mark.parametrize("thought, asking", THOUGHTS)
def test_thoughts_that_earlier_turns_lose_count_where_they_stand(thought, asking):
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
        f"loop.last %}}{thought}{{% endif %}}{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{asking}{{% endif %}}"
    )
    (example,) = encoded(tokenizer, TALK[:4])
    told = [tokenizer.decode(run) for run in learned(example)]
    thinks = thought.removeprefix(asking)
    assert told == ["9+8=17<|im_end|>", f"{thinks}The answer is 25<|im_end|>"]


@pytest.mark.parametrize(
    "turn",
    [
        "{{ 'x = ' if loop.last }}{{ m.content if loop.last else m.content | upper }}",
        "{{ m.content }}{{ 'x' if loop.last }}",
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(turn):
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + turn + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [TALK[0], {"role": "assistant", "content": "is"}, *TALK[2:4]]
    with pytest.raises(UserError, match=r"row 1: .*assistant_only_loss.*message 2"):
        encoded(tokenizer, talk)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_cut_leaves_what_counts_before_it(cut):
    tokenizer = vocabulary("bytes").with_template("chatml")
    (whole,) = encoded(tokenizer, TALK)
    first = len(learned(whole)[0])
    second = whole.learned.index(True, first)
    # within the first answer, between both, within the second
    for length in (first - cut, second - 1, second + cut):
        rows = encoded(tokenizer, TALK, max_length=len(whole.prompt) + length)
        (short,) = rows
        counting = [place for place in range(length) if whole.learned[place]]
        assert short.prompt == whole.prompt
        assert short.num_learned == len(counting)
        assert short.completion == whole.completion[: counting[-1] + 1]
        assert "lose their end" in rows.notes[0]


def test_rows_without_anything_that_counts_are_left_out_and_said():
    tokenizer = vocabulary("bytes").with_template("chatml")
    rows = encoded(tokenizer, TALK[:1], TALK)
    assert len(rows) == 1
    assert "1 are left out: no token of theirs is the assistant's" in rows.notes[0]
    (whole,) = rows
    with pytest.raises(UserError, match=r"max_length \d+ leaves them no completion"):
        encoded(tokenizer, TALK, max_length=len(whole.prompt))


def test_a_conversation_may_begin_with_the_assistant():
    tokenizer = vocabulary("bytes, bos").with_template("llama3")
    (example,) = encoded(tokenizer, TALK[1:])
    (after,) = encoded(tokenizer, TALK)
    assert learned(example) == learned(after)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match=r"row 1: assistant_only_loss.*message 1"):
        encoded(tokenizer, TALK[1:])
    # what nothing comes before cannot be predicted
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    (example,) = encoded(tokenizer, TALK[1:2])
    (ids,) = tokenizer(["9+8=17"], add_special_tokens=False)["input_ids"]
    assert (example.prompt, example.completion) == (ids[:1], ids[1:])


@pytest.mark.parametrize(
    "row", [{"text": "x = 1"}, {"prompt": "x", "completion": "y"}, {"messages": "x = 1"}]
)
def test_rows_of_text_are_refused(row):
    tokenizer = vocabulary("bytes").with_template("chatml")
    rows = load_rows([row], SFT_COLUMNS)
    with pytest.raises(UserError, match="assistant_only_loss"):
        encode_examples(tokenizer, rows, None, assistant_only=True)


def test_a_batch_counts_what_its_examples_do():
    tokenizer = vocabulary("bytes").with_template("chatml")
    examples = encoded(tokenizer, TALK, TALK[:2])
    batch = collate(examples, 0)
    assert batch.mask.sum(1).tolist() == [example.num_learned for example in examples]
    assert batch.attention_mask.sum(1).tolist() == [len(example) for example in examples]
    assert batch.mask[0, : len(examples[0].completion)].tolist() == examples[0].learned


@pytest.fixture
def config(tmp_path):
    directory = Path(save_tiny(tmp_path / "model", initializer_range=0.05))
    tokenizer = tiny_tokenizer()
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '?' if m.role == 'user' else '=' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}" + tokenizer.eos_token + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    talks = [
        [("user", "9 pears"), ("assistant", "17"), ("user", "8 more"), ("assistant", "25")],
        [("user", "How many"), ("assistant", "9")],
        [("assistant", "7"), ("user", "5 coins"), ("assistant", "12 coins"), ("user", "8")],
    ]
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]})
        for talk in talks
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return SFTConfig(
        model=str(directory),
        dataset=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        per_device_train_batch_size=3,
        max_steps=1,
        max_grad_norm=0.0,
        assistant_only_loss=True,
    )


def reference_loss(config, only=True):
    """The mean cross-entropy of the assistants' tokens in float64, and the model that has it."""
    model = AutoModelForCausalLM.from_pretrained(config.model).double()
    tokenizer = tiny_tokenizer()
    losses = []
    for line in Path(config.dataset).read_text().splitlines():
        ids, counts = [], []
        for message in json.loads(line)["messages"]:
            answers = message["role"] == "assistant"
            (sign,) = tokenizer("=" if answers else "?", add_special_tokens=False)["input_ids"]
            text = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            text += [tokenizer.eos_token_id] * answers
            ids += [sign, *text]
            counts += [not only, *[answers or not only] * len(text)]
        logits = model(torch.tensor([ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        losses.append(each[torch.tensor(counts[1:])])
    return torch.cat(losses).mean(), model


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_the_loss_and_its_gradient_are_the_float64_reference(
    config, monkeypatch, micro, fused_head
):
    loss, model = reference_loss(config)
    loss.backward()
    taken = []

    def spy(self, *args, **kwargs):
        taken.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
        return ADAMW_STEP(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    changes = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 3 // micro,
        "fused_head": fused_head,
    }
    result = train_sft(dataclasses.replace(config, **changes))
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = sorted((p.grad for p in model.parameters()), key=lambda g: (g.shape, g.norm().item()))
    taken.sort(key=lambda g: (g.shape, g.norm().item()))
    for found, want in zip(taken, wanted, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)


def test_without_the_option_all_of_a_conversation_counts(config):
    whole, _ = reference_loss(config, only=False)
    only, _ = reference_loss(config)
    result = train_sft(dataclasses.replace(config, assistant_only_loss=False))
    assert result.metrics["loss"] == pytest.approx(whole.item(), rel=1e-5)
    assert whole.item() != pytest.approx(only.item(), rel=1e-3)


def test_an_evaluation_counts_the_same_tokens(config, tmp_path):
    lines = Path(config.dataset).read_text().splitlines()
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(lines[:2]))
    config = dataclasses.replace(config, eval_dataset=str(held_out), learning_rate=1e-12)
    result = train_sft(config)
    loss, _ = reference_loss(dataclasses.replace(config, dataset=str(held_out)))
    assert result.metrics["eval/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_data_that_is_no_conversation_is_refused_before_anything_is_written(config, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "7", "completion": "8"}))
    with pytest.raises(UserError, match="assistant_only_loss is for rows of 'messages'"):
        train_sft(dataclasses.replace(config, dataset=str(tmp_path / "text.jsonl")))
    assert not Path(config.output_dir).exists()
