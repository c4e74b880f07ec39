"""Preference pairs: columns, prompts, truncation, and what is refused."""

import json

import pytest
import torch
from helpers.tiny import tiny_tokenizer

from rlcore.data.pairs import collate_pairs, load_pairs, margins
from rlcore.errors import UserError

ROW = {"prompt": "Ben has 9 pears.", "chosen": " 9+8=17", "rejected": " 9+8=16, 1"}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(directory, *rows):
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(pair, tokenizer):
    return [tokenizer.decode(ids) for ids in (pair.chosen.prompt, pair.chosen.completion)]


def test_both_answers_follow_the_same_prompt_and_end_with_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    (pair,) = load_pairs(tokenizer, write(tmp_path, ROW), None)
    assert pair.chosen.prompt == pair.rejected.prompt
    assert texts(pair, tokenizer)[0] == ROW["prompt"]
    for answer, side in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
        assert answer.completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer.completion[:-1]) == ROW[side]
    assert pair.margin is None and margins([pair]) is None


def test_without_a_prompt_the_common_beginning_is_the_prompt(tmp_path):
    tokenizer = tiny_tokenizer()
    whole = {side: ROW["prompt"] + ROW[side] for side in ("chosen", "rejected")}
    (implicit,) = load_pairs(tokenizer, write(tmp_path, whole), None)
    # " 9+8=1" is common too
    assert tokenizer.decode(implicit.chosen.prompt) == ROW["prompt"] + " 9+8=1"
    words = {"chosen": "Ben has pears", "rejected": "Ben has coins"}
    (implicit,) = load_pairs(tokenizer, write(tmp_path, words), None)
    assert texts(implicit, tokenizer)[0] == "Ben has"


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = type(tiny_tokenizer()).from_pretrained(save(tmp_path))
    tokenizer.chat_template = CHAT
    prompt = [{"role": "user", "content": "Ben has 9 pears."}]
    chosen, rejected = ([{"role": "assistant", "content": c}] for c in ("17", "16"))
    explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    implicit = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    pairs = [load_pairs(tokenizer, write(tmp_path, row), None)[0] for row in (explicit, implicit)]
    assert pairs[0] == pairs[1]
    assert texts(pairs[0], tokenizer) == ["<user>Ben has 9 pears.<assistant>", "17"]


def save(directory):
    tiny_tokenizer().save_pretrained(directory / "tokenizer")
    return directory / "tokenizer"


def test_long_answers_are_cut_at_their_end_and_pairs_without_an_answer_drop_out(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path, ROW, {**ROW, "prompt": ROW["prompt"] * 20})
    (whole, _), (pair,) = load_pairs(tokenizer, path, None), load_pairs(tokenizer, path, 13)
    assert len(pair.chosen) == len(pair.rejected) == 13
    assert pair.chosen.completion == whole.chosen.completion[: 13 - len(whole.chosen.prompt)]
    with pytest.raises(UserError, match=r"no pair is left: of 2 rows .* max_length .*line 1"):
        load_pairs(tokenizer, path, 2)


def test_a_batch_has_the_chosen_rows_first(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = ROW, {**ROW, "prompt": "7", "margin": 2.0}
    pairs = load_pairs(tokenizer, write(tmp_path, *rows), None)
    batch = collate_pairs(pairs, tokenizer.pad_token_id)
    answers = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    for ids, attention, mask, answer in zip(
        batch.input_ids, batch.attention_mask, batch.mask, answers, strict=True
    ):
        assert ids[attention.bool()].tolist() == answer.prompt + answer.completion
        assert int(mask.sum()) == len(answer.completion)
    assert torch.equal(margins(pairs), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "needs the column 'prompt' \\+ 'chosen' \\+ 'rejected'"),
        ({**ROW, "rejected": ROW["chosen"]}, "line 1: 'chosen' and 'rejected' are the same"),
        ({"chosen": "yes", "rejected": "no"}, "begin differently"),
        (
            {**ROW, "rejected": [{"role": "assistant", "content": "16"}]},
            "both be text or both be messages",
        ),
    ],
)
def test_unusable_rows_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_pairs(tiny_tokenizer(), write(tmp_path, row), None)
