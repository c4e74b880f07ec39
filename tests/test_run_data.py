"""What a run says of its data before it trains, and what it refuses there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, BloomConfig, LlamaConfig

from rlcore.errors import UserError
from rlcore.models.limits import context_window
from rlcore.trainers.dpo import DPOConfig, train_dpo
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.pg import PGConfig, train_pg
from rlcore.trainers.ppo import PPOConfig, train_ppo
from rlcore.trainers.reward_model import RewardModelConfig, train_reward_model
from rlcore.trainers.sft import SFTConfig, train_sft
from rlcore.trainers.shared import loading
from rlcore.trainers.shared.judging import make_judge
from rlcore.trainers.shared.loading import load_prompts
from rlcore.trainers.trpo import TRPOConfig, train_trpo

WINDOW = 64


def zero(prompts, completions, **_):
    return [0.0] * len(completions)


class Listener:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)

    def log(self, step, metrics):
        pass


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A model whose positions are learned: beyond the last there is none."""
    return save_tiny(tmp_path_factory.mktemp("model"), "gpt2")


def write(directory: Path, rows, name="rows.jsonl") -> str:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SAMPLING = {
    GRPOConfig: train_grpo,
    PGConfig: train_pg,
    PPOConfig: train_ppo,
    TRPOConfig: train_trpo,
}
OTHERS = {SFTConfig: train_sft, RewardModelConfig: train_reward_model, DPOConfig: train_dpo}


def run(config_class, tmp_path, model, rows, **options) -> list[str]:
    """One step on the rows; what the run said."""
    sampling = config_class in SAMPLING or options.get("online", False)
    small = {"max_completion_length": 2, "num_generations": 2} if sampling else {}
    path = rows if isinstance(rows, str) else write(tmp_path, rows)
    config = config_class(
        **{"model": model, "dataset": path, "output_dir": str(tmp_path / "run")}
        | {"per_device_train_batch_size": 2, "max_steps": 1, "fused_head": "off"}
        | small
        | options
    )
    listener = Listener()
    train = (SAMPLING | OTHERS)[config_class]
    train(config, tracker=listener, **({"reward_funcs": [zero]} if sampling else {}))
    return listener.messages


def demonstrations(*lengths) -> list[dict]:
    """Rows of (prompt, completion) tokens, eos not counted: digits are a token each."""
    return [{"prompt": "1" * prompt, "completion": "2" * answer} for prompt, answer in lengths]


def test_rows_that_are_cut_or_left_out_are_counted_in_one_line(tmp_path, gpt2):
    rows = demonstrations((3, 9), (2, 1), (9, 1), (8, 2), (8, 1), (1, 20), (9, 2))
    messages = run(SFTConfig, tmp_path, gpt2, rows, max_length=8)
    path = tmp_path / "rows.jsonl"
    assert messages == [
        f"of 7 rows 2 lose their end to max_length 8 (the first: {path}, line 1); "
        f"4 are left out: max_length 8 leaves them no completion (the first: {path}, line 3)"
    ]
    assert run(SFTConfig, tmp_path, gpt2, rows, output_dir=str(tmp_path / "again")) == []


def test_a_run_of_its_own_display_shows_the_line_too(tmp_path, gpt2, capsys):
    path = write(tmp_path, demonstrations((3, 9), (2, 1)))
    config = SFTConfig(
        model=gpt2, dataset=path, output_dir=str(tmp_path / "run"), max_length=8, max_steps=1
    )
    train_sft(config)
    said = "".join(capsys.readouterr())
    assert "of 2 rows 1 lose their end to max_length 8" in " ".join(said.split())


def test_rows_without_anything_to_learn_are_counted_too(tmp_path, gpt2):
    (message,) = run(SFTConfig, tmp_path, gpt2, demonstrations((0, 2), (1, 1)))
    assert message.startswith("of 2 rows 1 are left out: without a first token")


PAIRS = [
    {"prompt": "11", "chosen": "2222", "rejected": "3"},
    {"prompt": "1111", "chosen": "24", "rejected": "23"},
    {"prompt": "11111", "chosen": "2", "rejected": "3"},
    {"prompt": "1", "chosen": "2", "rejected": "3"},
]


def test_pairs_that_are_cut_left_out_or_equal_are_counted_in_one_line(tmp_path, gpt2):
    (message,) = run(DPOConfig, tmp_path, gpt2, PAIRS, max_length=5)
    path = tmp_path / "rows.jsonl"
    assert message == (
        f"of 4 rows 1 lose an answer's end to max_length 5 (the first: {path}, line 1); "
        "1 are left out: their answers are the same once max_length 5 cut them "
        f"(the first: {path}, line 2); "
        f"1 are left out: an answer does not fit into max_length 5 (the first: {path}, line 3)"
    )
    (message,) = run(
        RewardModelConfig, tmp_path, gpt2, PAIRS, max_length=6, output_dir=str(tmp_path / "again")
    )
    assert message == (
        "of 4 rows 3 are left out: an answer does not fit into max_length 6 "
        f"(the first: {path}, line 1)"
    )


def test_a_margin_that_is_no_number_is_named_with_its_line(tmp_path, gpt2):
    rows = [PAIRS[3] | {"margin": 1}, PAIRS[3] | {"margin": "much"}]
    with pytest.raises(
        UserError, match=r"rows.jsonl, line 2: 'margin' must be a number, not 'much'"
    ):
        run(RewardModelConfig, tmp_path, gpt2, rows)


@pytest.mark.parametrize("config_class", SAMPLING, ids=lambda each: each.__name__)
def test_prompts_that_lose_their_beginning_and_truncated_sampling_are_said(
    tmp_path, gpt2, config_class
):
    rows = [{"prompt": "12"}, {"prompt": "1234"}, {"prompt": "123"}]
    options = {"max_prompt_length": 2, "top_p": 0.9, "top_k": 5}
    cut, truncated = run(config_class, tmp_path, gpt2, rows, **options)
    assert cut.startswith("of 3 rows 2 prompts lose their beginning to max_prompt_length 2")
    assert cut.endswith(f"(the first: {tmp_path}/rows.jsonl, line 2)")
    assert truncated.startswith("top_p 0.9 and top_k 5: completions are sampled from the likeliest")


def test_sampling_from_the_whole_distribution_needs_no_word(tmp_path, gpt2):
    assert run(DPOConfig, tmp_path, gpt2, [{"prompt": "12"}], online=True) == []


@pytest.mark.parametrize("config_class", [*OTHERS, *SAMPLING], ids=lambda each: each.__name__)
def test_rows_longer_than_the_context_window_are_refused_before_anything_is_written(
    tmp_path, gpt2, config_class
):
    long = {"prompt": "1" * (WINDOW - 3), "completion": "222", "chosen": "222", "rejected": "3"}
    rows = [{"prompt": "1", "completion": "2", "chosen": "2", "rejected": "3"}, long]
    fits = dict(long, prompt=long["prompt"][1:])
    if config_class in SAMPLING:
        options = {"max_completion_length": 4}
        message = r"line 2: 61 tokens and max_completion_length 4 make 65, but .* 64 positions"
    else:
        options = {"max_length": None}
        message = "line 2: 65 tokens, but .* has 64 positions: lower max_length"
    with pytest.raises(UserError, match=message):
        run(config_class, tmp_path, gpt2, rows, **options)
    assert not (tmp_path / "run").exists()
    run(config_class, tmp_path, gpt2, [fits], **options)


def test_a_held_out_row_longer_than_the_window_is_refused_too(tmp_path, gpt2):
    held_out = write(tmp_path, demonstrations((1, 1), (WINDOW, 1)), "held_out.jsonl")
    with pytest.raises(UserError, match=r"held_out.jsonl, line 2: 66 tokens"):
        run(SFTConfig, tmp_path, gpt2, demonstrations((1, 1)), eval_dataset=held_out)


def test_a_reward_model_is_asked_for_its_window_with_whole_prompts(tmp_path, gpt2):
    run(RewardModelConfig, tmp_path, gpt2, PAIRS, output_dir=str(tmp_path / "reward"))
    rows = [{"prompt": "1" * WINDOW}]
    with pytest.raises(
        UserError, match=r"64 tokens and max_completion_length 2 make 66, but '.*reward'"
    ):
        run(
            GRPOConfig, tmp_path, gpt2, rows, max_prompt_length=8, reward_model=f"{tmp_path}/reward"
        )


ROTARY = {
    "default": ({}, 64),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 256),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "stretched already": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        64,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        64,
    ),
}


@pytest.mark.parametrize("rope, window", ROTARY.values(), ids=ROTARY)
def test_the_window_is_what_rotary_scaling_makes_of_it(rope, window):
    parameters = {"rope_theta": 1e4, "rope_type": "default"} | rope
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=parameters)
    assert context_window(config) == window


def test_the_window_is_found_under_each_kinds_own_name_or_not_at_all():
    assert context_window(tiny_model("gpt2").config) == WINDOW
    assert context_window(tiny_model("gemma3").config) == WINDOW
    assert context_window(BloomConfig()) is None


@pytest.fixture(scope="module")
def outgrown(tmp_path_factory) -> str:
    """A model whose tokenizer got a token that its embedding does not have."""
    path = save_tiny(tmp_path_factory.mktemp("outgrown"), "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("config_class", [*OTHERS, GRPOConfig], ids=lambda each: each.__name__)
def test_token_ids_beyond_the_embedding_are_refused_where_they_are_used(
    tmp_path, outgrown, config_class
):
    row = {"prompt": "1", "completion": "2", "chosen": "2", "rejected": "3"}
    run(config_class, tmp_path, outgrown, [row])
    size = len(tiny_tokenizer())
    message = rf"line 2: the token '<new>' has the id {size}, but .* has {size} rows"
    with pytest.raises(UserError, match=message):
        run(config_class, tmp_path, outgrown, [row, row | {"prompt": "<new>"}], output_dir="none")
    assert not Path("none").exists()


def test_a_token_for_padding_beyond_the_embedding_is_refused(tmp_path):
    path = save_tiny(tmp_path / "model", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "<hole>"})
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="padding: the token '<hole>' has the id"):
        run(SFTConfig, tmp_path, path, demonstrations((1, 1)))


RAISES = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> str:
    """A model with a chat template that does not take every message."""
    path = save_tiny(tmp_path_factory.mktemp("chatty"), "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = RAISES
    tokenizer.save_pretrained(path)
    return path


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("bad, why", [(chat("bad"), "no bad words"), ("", "has no tokens")])
@pytest.mark.parametrize("where", [0, 1500])
def test_a_prompt_that_cannot_be_encoded_is_named_before_anything_trains(
    tmp_path, chatty, bad, why, where
):
    rows = [{"prompt": chat("7")}] * 2000
    rows[where] = {"prompt": bad}
    with pytest.raises(UserError, match=f"rows.jsonl, line {where + 1}: .*{why}"):
        run(GRPOConfig, tmp_path, chatty, rows)
    assert not (tmp_path / "run").exists()


def test_a_held_out_prompt_is_encoded_at_the_start_too(tmp_path, chatty):
    held_out = write(tmp_path, [{"prompt": "1"}, {"prompt": chat("bad")}], "held_out.jsonl")
    with pytest.raises(UserError, match=r"held_out.jsonl, line 2: .*no bad words"):
        run(GRPOConfig, tmp_path, chatty, [{"prompt": "1"}], eval_dataset=held_out)


@pytest.mark.parametrize("config_class", OTHERS, ids=lambda each: each.__name__)
def test_an_answer_that_cannot_be_encoded_is_named_too(tmp_path, chatty, config_class):
    answers = {"completion": chat("8"), "chosen": chat("8"), "rejected": chat("9")}
    good = {"prompt": chat("7")} | answers
    bad = good | {name: chat("bad") for name in ("completion", "chosen")}
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: .*no bad words"):
        run(config_class, tmp_path, chatty, [good, bad])


def test_prompts_are_encoded_many_at_a_time_and_once(tmp_path, gpt2, monkeypatch):
    sizes = []
    encode = loading.encode_prompts

    def spy(tokenizer, prompts):
        sizes.append(len(prompts))
        return encode(tokenizer, prompts)

    monkeypatch.setattr(loading, "encode_prompts", spy)
    path = write(tmp_path, [{"prompt": str(n)} for n in range(2500)])
    config = GRPOConfig(model=gpt2, dataset=path, output_dir="unused")
    data = load_prompts(config, tiny_tokenizer(), make_judge(config, [zero]))
    assert sizes == [1024, 1024, 452]
    assert (data.train.extent.length, data.train.extent.longest) == (4, f"{path}, line 1001")


@pytest.mark.parametrize("name", ["completions", "prompts", "completion_ids"])
@pytest.mark.parametrize("config_class", [GRPOConfig, PPOConfig, DPOConfig])
def test_a_column_with_a_name_that_rewards_are_called_with_is_refused(
    tmp_path, gpt2, name, config_class
):
    options = {"online": True} if config_class is DPOConfig else {}
    with pytest.raises(UserError, match=f"rows.jsonl: a column is called '{name}'.*rename it"):
        run(config_class, tmp_path, gpt2, [{"prompt": "1", name: "2"}], **options)


def test_a_reward_that_needs_another_column_is_refused_at_the_start(tmp_path, gpt2):
    rows = [{"prompt": "1", "anwser": "2"}]
    message = r"reward function 'exact_match' cannot be called with anwser, .*'answer'"
    with pytest.raises(UserError, match=message):
        run(GRPOConfig, tmp_path, gpt2, rows, reward=["exact_match"])
    assert not (tmp_path / "run").exists()


def test_nested_values_reach_training_text_and_rewards_as_they_are(tmp_path, chatty):
    calls = [{"x": 1}, {"city": "Rome"}, {"y": [1, 2.0, "3"]}, 2**70]
    rows = [{"prompt": "1", "call": call} for call in calls]
    seen = []

    def spy(prompts, completions, call):
        seen.extend(call)
        return [0.0] * len(call)

    path = write(tmp_path, rows)
    config = GRPOConfig(
        model=chatty,
        dataset=path,
        output_dir=str(tmp_path / "run"),
        num_generations=2,
        max_completion_length=1,
        max_steps=1,
    )
    train_grpo(config, reward_funcs=[spy])
    assert sorted(map(repr, seen)) == sorted(map(repr, calls * 2))


@pytest.mark.parametrize("cls", [SFTConfig, GRPOConfig])
def test_held_out_rows_that_are_the_training_rows_are_refused_and_others_counted(
    tmp_path, gpt2, cls
):
    rows = demonstrations((1, 1), (2, 2), (3, 3))
    in_another_order = write(tmp_path, rows[::-1], "copy.jsonl")
    with pytest.raises(
        UserError, match=r"holds the rows of dataset \(.*copy\.jsonl, .*rows\.jsonl\)"
    ):
        run(cls, tmp_path, gpt2, rows, eval_dataset=in_another_order)
    assert not (tmp_path / "run").exists()
    some = write(tmp_path, rows[1:] + demonstrations((4, 4)), "some.jsonl")
    (note,) = run(cls, tmp_path, gpt2, rows, eval_dataset=some)
    assert note == f"{some}: 2 of 3 held-out rows are among those to train on"
    others = write(tmp_path, demonstrations((1, 2), (2, 3)), "others.jsonl")
    options = {"eval_dataset": others, "output_dir": f"{tmp_path}/again"}
    assert run(cls, tmp_path, gpt2, rows, **options) == []


def test_one_directory_for_both_gives_both_splits_and_says_which(tmp_path, gpt2):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, demonstrations((1, 1), (2, 2), (3, 3)), "train.jsonl")
    write(folder, demonstrations((4, 4)), "test.jsonl")
    messages = run(SFTConfig, tmp_path, gpt2, str(folder), eval_dataset=str(folder))
    assert messages == [
        f"{folder}: the 3 rows of its split 'train'",
        f"{folder}: the 1 rows of its split 'test'",
    ]


def test_null_fields_of_a_tables_column_are_said_where_rewards_get_them(tmp_path, gpt2):
    import pandas

    frame = pandas.DataFrame({"prompt": ["1", "2"], "call": [{"x": 1}, {"city": "Rome"}]})
    frame.to_parquet(tmp_path / "rows.parquet")
    (message,) = run(GRPOConfig, tmp_path, gpt2, f"{tmp_path}/rows.parquet")
    assert message.startswith(f"{tmp_path}/rows.parquet: objects in 'call' have null fields")


@pytest.mark.parametrize(
    "option",
    [{"lora_r": 8}, {"lora_alpha": 1.0}, {"lora_dropout": 0.1}, {"lora_target_modules": ["x"]}],
    ids=lambda each: next(iter(each)),
)
@pytest.mark.parametrize("config_class", OTHERS, ids=lambda each: each.__name__)
def test_options_of_an_adapter_without_one_are_refused(tmp_path, config_class, option):
    config = config_class(model="m", dataset="d", output_dir=str(tmp_path / "run"))
    (name,) = option
    with pytest.raises(UserError, match=f"{name} is set, but without peft"):
        OTHERS[config_class](dataclasses.replace(config, **option))


@pytest.mark.parametrize("name, said", [("test", True), ("tests", False)])
def test_programs_without_tests_to_pass_are_told(tmp_path, name, said):
    path = write(tmp_path, [{"prompt": "1", name: "assert f(1) == 2"}])
    config = GRPOConfig(
        model="unused", dataset=path, output_dir=str(tmp_path / "run"), reward=["code_runs"]
    )
    notes = load_prompts(config, tiny_tokenizer(), make_judge(config)).notes
    told = f"{path} has no column 'tests': code_runs rewards every program that runs"
    assert list(notes) == [told] * said
