"""What is learned, what is sampled and what is judged are the same tokens, whatever the tokenizer.

Every encoder of the trainers is held to the tokenizer's own template and to its pieces spelled out.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_model
from helpers.vocabularies import BOS, EOS, TEMPLATES, VOCABULARIES, vocabulary
from transformers import AutoTokenizer, ByT5Tokenizer

from rlcore.commands.merge import MergeConfig, merge
from rlcore.data.chat import answer_text
from rlcore.data.encoding import encode_examples, encode_prompts
from rlcore.data.ends import end_ids, end_of_turn, end_tokens, missing_end
from rlcore.data.pairs import load_pairs
from rlcore.data.rows import Part, Rows
from rlcore.data.tokens import mid_text, plain_ids
from rlcore.errors import UserError
from rlcore.models.loading import load_classifier, load_tokenizer
from rlcore.models.reward_model import RewardModel
from rlcore.sampling import rollout
from rlcore.sampling.rollout import generate
from rlcore.trainers import sft
from rlcore.trainers.reward_model import load_ended_pairs
from rlcore.trainers.sft import SFTConfig, train_sft

every_vocabulary = pytest.mark.parametrize("name", VOCABULARIES)
every_template = pytest.mark.parametrize("template", TEMPLATES)

# (prompt, completion): words that touch, blanks on either side, lines, the middle of a word
TEXTS = [
    ("x =", "1"),
    ("x =", " 1"),
    ("x = ", "1"),
    ("x =", "  1 and"),
    ("How many pe", "ars?"),
    ("Ben has", " 9 pears,"),
    ("9+8", "=17\n17"),
    ("9+8=17\n", "17+8"),
    ("9+8=17\n", "\nThe answer"),
    ("x =\n", " 12"),
]


def examples(tokenizer, *rows):
    data = Rows(rows, [Part("rows.jsonl", "line", range(1, len(rows) + 1))])
    data.group = tuple(rows[0])
    return encode_examples(tokenizer, data)


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_rows(known):
    """The rows of `TEXTS` that say something to a vocabulary of whole words."""
    return [pair for pair in TEXTS if known.keeps_blanks or pair[1][0] in " \n"]


# one model for all vocabularies: what it says is written down beforehand
model_of = functools.cache(lambda size: tiny_model(vocab_size=size))


def sampled(monkeypatch, tokenizer, prompt, *scripts):
    """A rollout of completions that are written down beforehand, one a generation."""
    model = model_of(len(tokenizer))
    steps = max(map(len, scripts))
    columns = torch.tensor([[*s, *[3] * (steps - len(s))] for s in scripts]).T
    fit = torch.zeros(len(scripts), dtype=torch.bool)
    logp = torch.zeros(len(scripts))
    script = iter([(column, logp, fit) for column in columns])
    monkeypatch.setattr(rollout, "likeliest", lambda logits: next(script))
    return generate(
        model,
        tokenizer,
        [prompt],
        num_generations=len(scripts),
        max_new_tokens=steps,
        greedy=True,
        full_length=True,
    )


def kept(result):
    pairs = zip(result.completion_ids, result.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


@every_vocabulary
def test_text_is_learned_as_it_is_spelled_and_sampled_so(name, monkeypatch):
    known = vocabulary(name)
    tokenizer = known.tokenizer
    opening = BOS if known.has_bos else ""
    for prompt, completion in text_rows(known):
        (row,) = examples(tokenizer, {"prompt": prompt, "completion": completion})
        assert known.same_text(known.spell(row.prompt), opening + known.dummy + prompt)
        assert known.same_text(known.spell(row.completion), completion + EOS), (prompt, completion)
        assert encode_prompts(tokenizer, [prompt]) == [row.prompt]
        result = sampled(monkeypatch, tokenizer, prompt, row.completion)
        assert result.input_ids[0].tolist() == row.prompt + row.completion
        assert known.same_text(result.completions[0], completion)
        assert not result.truncated.any()


@every_vocabulary
def test_special_tokens_that_the_text_has_already_come_once(name):
    known = vocabulary(name)
    prompt, completion = "Ben has", " 9 pears,"
    plain, given, other = (
        examples(known.tokenizer, {"prompt": head, "completion": tail})[0]
        for head, tail in (
            (prompt, completion),
            (BOS + prompt, completion + EOS),
            (prompt, completion + "<|im_end|>" + EOS),
        )
    )
    bos, eos = known.tokenizer.bos_token_id, known.tokenizer.eos_token_id
    assert (given.prompt + given.completion).count(bos) == 1
    assert given.prompt[0] == bos and given.completion == plain.completion
    assert plain.prompt.count(bos) == known.has_bos and plain.prompt.count(eos) == 0
    assert plain.completion.count(eos) == other.completion.count(eos) == 1
    whole = prompt + completion
    for text in (whole, BOS + whole, whole + EOS, BOS + whole + EOS):
        (row,) = examples(known.tokenizer, {"text": text})
        ids = row.prompt + row.completion
        assert ids.count(bos) == (known.has_bos or text.startswith(BOS))
        assert ids.count(eos) == 1 and ids[-1] == eos
        (asked,) = encode_prompts(known.tokenizer, [text])
        assert asked == ids[: None if text.endswith(EOS) else -1]


@every_vocabulary
def test_the_middle_of_a_text_is_spelled_as_it_stands(name):
    known = vocabulary(name)
    middle = mid_text(known.tokenizer)
    for text in ("1", " 1", "  1 and", "\nThe answer", "ars?"):
        (ids,) = plain_ids(middle, [text])
        if known.keeps_blanks:
            assert known.spell(ids) == middle.decode(ids) == text
        assert middle.get_vocab() == known.tokenizer.get_vocab()


@every_vocabulary
def test_what_follows_a_special_token_may_begin_anew(name, monkeypatch):
    known = vocabulary(name)
    tokenizer = known.tokenizer
    prompt = "x =<|im_start|>"
    (whole,) = plain_ids(tokenizer, [prompt + "12"])
    (row,) = examples(tokenizer, {"prompt": prompt, "completion": "12"})
    assert (row.prompt + row.completion)[known.has_bos : -1] == whole
    result = sampled(monkeypatch, tokenizer, prompt, row.completion)
    # byte-level decoders show the blank that the tokenizer wrote, the others take it off
    assert result.completions == [" 12" if "spaced" in name else "12"]


def test_an_empty_prompt_is_what_opens_a_sequence(monkeypatch):
    known = vocabulary("metaspace always, bos")
    (row,) = examples(known.tokenizer, {"prompt": "", "completion": "12"})
    assert known.spell(row.prompt) == BOS and known.spell(row.completion) == " 12" + EOS
    result = sampled(monkeypatch, known.tokenizer, "", row.completion)
    assert result.completions == ["12"]
    both = vocabulary("spaced bytes, bos and eos").tokenizer
    assert encode_prompts(both, [""]) == [[both.bos_token_id]]
    for name in ("bytes", "bytes, eos"):
        with pytest.raises(UserError, match="no tokens"):
            encode_prompts(vocabulary(name).tokenizer, [""])


def test_a_tokenizer_without_eos_ends_nothing():
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.eos_token = None
    (row,) = examples(tokenizer, {"prompt": "x", "completion": " 1"})
    assert tokenizer.decode(row.completion) == " 1"


@every_vocabulary
def test_pairs_hold_the_same_tokens_as_rows_to_imitate(name, tmp_path):
    known = vocabulary(name)
    for prompt, completion in text_rows(known):
        answers = {"chosen": completion, "rejected": completion + " and 1"}
        path = write(tmp_path / "pairs.jsonl", {"prompt": prompt, **answers})
        (pair,) = load_pairs(known.tokenizer, path, None)
        assert load_ended_pairs(known.tokenizer, path, None) == [pair]
        for side, answer in answers.items():
            row = {"prompt": prompt, "completion": answer}
            assert [getattr(pair, side)] == examples(known.tokenizer, row)


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


CHATS = [
    (chat("x = 1 and y"), "1"),
    (chat("How many pears?"), "Ben has 25"),
    (chat("x = 12", "so x", "and y?"), "y = 13\n\nThe answer is 12"),
    (chat("x = 12"), "\n12"),
]


def rendered(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@every_template
@every_vocabulary
def test_messages_are_learned_token_for_token_as_the_template_writes_them(name, template):
    known = vocabulary(name)
    tokenizer = known.with_template(template)
    for prompt, content in CHATS:
        answer = [{"role": "assistant", "content": content}]
        whole = rendered(tokenizer, prompt + answer)
        head = rendered(tokenizer, prompt, add_generation_prompt=True)
        (row,) = examples(tokenizer, {"prompt": prompt, "completion": answer})
        assert row.prompt == head and encode_prompts(tokenizer, [prompt]) == [head]
        assert known.spell(row.completion).strip().startswith(content.split()[0])
        if whole[: len(head)] == head:
            assert row.prompt + row.completion == whole
        assert known.spell(row.prompt + row.completion) == known.spell(whole)
        (row,) = examples(tokenizer, {"messages": prompt + answer})
        assert row.prompt + row.completion == whole


@every_template
@every_vocabulary
def test_reward_models_judge_what_a_policy_samples_as_they_learned_it(
    name, template, tmp_path, monkeypatch
):
    known = vocabulary(name)
    tokenizer = known.with_template(template)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[template][1])
    reward = RewardModel("somewhere")
    reward.tokenizer = reward.policy_tokenizer = tokenizer
    for prompt, content in CHATS:
        answers = {"chosen": content, "rejected": "Ben"}
        messages = {s: [{"role": "assistant", "content": text}] for s, text in answers.items()}
        path = write(tmp_path / "pairs.jsonl", {"prompt": prompt, **messages})
        (pair,) = load_pairs(tokenizer, path, None)
        (learned,) = load_ended_pairs(tokenizer, path, None)
        scripts = pair.chosen.completion, pair.rejected.completion
        result = sampled(monkeypatch, tokenizer, prompt, *scripts)
        for row, side in enumerate(("chosen", "rejected")):
            example = getattr(learned, side)
            assert example.completion == kept(result)[row]
            assert example.completion[-1] == end and example.completion.count(end) == 1
            assert result.input_ids[row, : result.prompt_length].tolist() == example.prompt
            assert known.same_text(result.completions[row].strip(), answers[side].strip())
            if known.keeps_blanks and content == content.strip():
                # the template's, which a tokenizer that writes blanks of its own takes for one
                shows_blank = template == "llama2" and (not known.dummy or "bytes" in name)
                assert result.completions[row].startswith(" ") == shows_blank
        assert not result.truncated.any()
        for ids in (None, kept(result)):
            asked = reward.examples([prompt] * 2, list(messages.values()), ids)
            assert asked == [learned.chosen, learned.rejected]


def test_reward_models_are_asked_in_their_own_template_whatever_the_policys(tmp_path):
    prompt, content = CHATS[0]
    answers = {"chosen": content, "rejected": "Ben"}
    messages = {s: [{"role": "assistant", "content": text}] for s, text in answers.items()}
    path = write(tmp_path / "pairs.jsonl", {"prompt": prompt, **messages})
    reward = RewardModel("somewhere")
    reward.tokenizer = vocabulary("bytes").with_template("gemma")
    reward.policy_tokenizer = vocabulary("bytes").with_template("chatml")
    (learned,) = load_ended_pairs(reward.tokenizer, path, None)
    (policys,) = load_ended_pairs(reward.policy_tokenizer, path, None)
    sampled = [policys.chosen.completion, policys.rejected.completion]
    asked = reward.examples([prompt] * 2, list(messages.values()), sampled)
    assert asked == [learned.chosen, learned.rejected] != [policys.chosen, policys.rejected]
    # one that was cut has no end to exchange
    (cut, _) = reward.examples([prompt] * 2, list(messages.values()), [s[:-1] for s in sampled])
    assert cut.completion == sampled[0][:-1]
    # text ends with eos: each has its own
    reward.policy_tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    end = reward.policy_tokenizer.eos_token_id
    (text,) = reward.examples(["x ="], [" 1"], [[5, end]])
    assert text.completion == [5, reward.tokenizer.eos_token_id]


@every_vocabulary
def test_reward_models_judge_text_as_they_learned_it(name, tmp_path):
    known = vocabulary(name)
    reward = RewardModel("somewhere")
    reward.tokenizer = reward.policy_tokenizer = known.tokenizer
    for prompt, completion in text_rows(known):
        row = {"prompt": prompt, "chosen": completion, "rejected": " 1 and 1"}
        path = write(tmp_path / "pairs.jsonl", row)
        (learned,) = load_ended_pairs(known.tokenizer, path, None)
        asked = reward.examples([prompt] * 2, [row["chosen"], row["rejected"]])
        assert asked == [learned.chosen, learned.rejected]


@every_template
@every_vocabulary
def test_an_answer_that_was_begun_goes_on(name, template, monkeypatch):
    known = vocabulary(name)
    tokenizer = known.with_template(template)
    begun = chat("How many pears?", "The answer")
    rest = [{"role": "assistant", "content": " is 25"}]
    whole = rendered(tokenizer, chat("How many pears?", "The answer is 25"))
    (head,) = encode_prompts(tokenizer, [begun])
    assert known.spell(head).endswith("The answer")
    assert whole[: len(head)] == head
    (row,) = examples(tokenizer, {"prompt": begun, "completion": rest})
    assert row.prompt == head and row.prompt + row.completion == whole
    result = sampled(monkeypatch, tokenizer, begun, row.completion)
    # llama2 writes a blank before its end
    assert known.same_text(result.completions[0].rstrip(), " is 25")


def test_what_begins_an_answer_and_what_goes_on_with_it_are_one_message():
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.name }}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    )
    begun = [{"role": "assistant", "content": "The", "name": "Ben", "tool_calls": None}]
    rest = [{"role": "assistant", "content": " end", "name": None, "tool_calls": [1]}]
    assert answer_text(tokenizer, begun, rest) == ("BenThe", " end[1]")


def test_what_cannot_go_on_is_refused():
    tokenizer = vocabulary("bytes").with_template("chatml")
    begun = chat("How many pears?", "The answer")
    user = [{"role": "user", "content": "and?"}]
    with pytest.raises(UserError, match="ends with an assistant message"):
        examples(tokenizer, {"prompt": begun, "completion": user})
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(UserError, match="ends with an assistant message"):
        encode_prompts(tokenizer, [[*begun[:1], call]])


def test_a_tokenizer_without_a_rust_backend_is_read_alike():
    tokenizer = ByT5Tokenizer()  # closes every text with eos
    (row,) = examples(tokenizer, {"prompt": "x =", "completion": " 1"})
    assert bytes(index - 3 for index in row.prompt) == b"x ="
    assert bytes(index - 3 for index in row.completion[:-1]) == b" 1"
    assert row.completion[-1] == tokenizer.eos_token_id
    assert encode_prompts(tokenizer, ["x ="]) == [row.prompt]


def test_one_that_writes_blanks_of_its_own_is_refused(monkeypatch):
    tokenizer = ByT5Tokenizer()
    monkeypatch.setattr(tokenizer, "_tokenize", lambda text: list("▁" + text))
    with pytest.raises(UserError, match="writes a blank before every text"):
        mid_text(tokenizer)


@pytest.mark.parametrize("turned", [False, True])
def test_text_and_messages_do_not_mix_in_a_row(turned):
    tokenizer = vocabulary("bytes").with_template("chatml")
    row = {"prompt": "7", "completion": chat("7")}
    if turned:
        row = {"prompt": chat("7"), "completion": "7"}
    with pytest.raises(UserError, match="must both be text or both be messages"):
        examples(tokenizer, row)


@every_template
@every_vocabulary
def test_the_end_of_a_turn_is_read_from_the_template(name, template):
    tokenizer = vocabulary(name).with_template(template)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[template][1])
    assert end_of_turn(tokenizer) == end
    assert end_ids(tokenizer) == {end, tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "template",
    [
        None,
        # no token, blanks that the vocabulary holds as one, a template that refuses to be asked
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}\n\n{% endfor %}",
        "{{ raise_exception('never') }}",
        "{{ messages[0].nothing.at.all }}",
    ],
)
def test_a_template_may_have_no_end_of_a_turn(template):
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.add_tokens(["\n\n"])
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) is None
    assert end_ids(tokenizer) == {tokenizer.eos_token_id}
    assert (missing_end(tokenizer) is None) == (template is None)


def test_the_end_of_a_turn_is_the_first_token_behind_the_answer_and_read_whole():
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>now"]})
    tokenizer.chat_template = (
        "Say your (answer)<|im_end|>{% for m in messages %}{{ m.content }}<|end|>now{% endfor %}"
        "{{ eos_token }}"
    )
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>now")


def test_an_end_that_is_not_marked_special_is_no_part_of_the_text(monkeypatch):
    tokenizer = vocabulary("bytes").tokenizer
    tokenizer.add_tokens(["<stop>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<stop>{% endfor %}"
    (prompt, content), answer = CHATS[0], [{"role": "assistant", "content": CHATS[0][1]}]
    (row,) = examples(tokenizer, {"prompt": prompt, "completion": answer})
    assert tokenizer.decode(row.completion, skip_special_tokens=True) == content + "<stop>"
    result = sampled(monkeypatch, tokenizer, prompt, row.completion)
    assert result.completions == [content] and not result.truncated.any()


def test_a_reward_model_without_a_template_takes_the_policys(tmp_path):
    base = base_model(tmp_path / "model")
    policy = load_tokenizer(base)
    load_classifier(base, new_head="random").save_pretrained(tmp_path / "reward")
    vocabulary("bytes").tokenizer.save_pretrained(tmp_path / "reward")
    reward = RewardModel(str(tmp_path / "reward"))
    reward.prepare(policy, torch.device("cpu"))
    (prompt, content), answer = CHATS[0], [{"role": "assistant", "content": CHATS[0][1]}]
    (asked,) = reward.examples([prompt], [answer])
    assert asked.prompt == rendered(policy, prompt, add_generation_prompt=True)
    assert policy.decode(asked.completion) == content + "<|im_end|>"
    scores = [reward([prompt], [answer], ids) for ids in (None, [asked.completion])]
    assert scores[0] == scores[1]


def base_model(directory) -> str:
    """Like Qwen2.5's base: one token ends its text, and another its template's turns."""
    tokenizer = vocabulary("bytes").with_template("chatml")
    eos = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(vocab_size=len(tokenizer), **eos)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def sft_config(directory, *rows, **changes):
    options = {
        "model": base_model(directory / "model"),
        "dataset": write(directory / "rows.jsonl", *rows),
        "output_dir": str(directory / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
    }
    return SFTConfig(**options | changes)


CHAT_ROW = {"prompt": chat("x ="), "completion": [{"role": "assistant", "content": "1"}]}


def test_a_saved_model_says_where_its_turns_end(tmp_path):
    train_sft(sft_config(tmp_path, CHAT_ROW, save_steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ends = sorted(tokenizer.convert_tokens_to_ids([EOS, "<|im_end|>"]))
    for directory in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        saved = json.loads((directory / "generation_config.json").read_text())
        assert saved["eos_token_id"] == ends
    assert tokenizer.eos_token == EOS


def test_a_merged_adapter_says_it_too(tmp_path):
    train_sft(sft_config(tmp_path, CHAT_ROW, peft="lora", lora_r=2))
    merge(MergeConfig(adapter=str(tmp_path / "run"), output_dir=str(tmp_path / "whole")))
    saved = json.loads((tmp_path / "whole" / "generation_config.json").read_text())
    tokenizer = vocabulary("bytes").tokenizer
    assert saved["eos_token_id"] == sorted(tokenizer.convert_tokens_to_ids([EOS, "<|im_end|>"]))


def test_the_eos_token_asked_for_ends_text_and_is_saved(tmp_path, monkeypatch):
    learned = []
    collate = sft.collate
    monkeypatch.setattr(
        sft, "collate", lambda rows, pad: learned.extend(rows) or collate(rows, pad)
    )
    row = {"prompt": "x =", "completion": " 1"}
    train_sft(sft_config(tmp_path, row, eos_token="<|end|>"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert all(example.completion[-1] == end for example in learned) and learned
    assert tokenizer.eos_token == "<|end|>"
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert end in saved["eos_token_id"]
    assert end in end_tokens(tiny_model(), tokenizer)


def test_an_eos_token_that_the_tokenizer_lacks_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"eos_token '<.nowhere.>' is no token of"):
        train_sft(sft_config(tmp_path, CHAT_ROW, eos_token="<|nowhere|>"))
    assert not Path(tmp_path / "run").exists()


def test_a_template_without_an_end_is_said_at_the_start(tmp_path, capsys):
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    config = sft_config(tmp_path, {"messages": chat("x =", "1")})
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.chat_template = bare
    tokenizer.save_pretrained(config.model)
    train_sft(config)
    assert "ends an assistant's turn with no token" in capsys.readouterr().err
