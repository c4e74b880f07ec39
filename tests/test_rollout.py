"""Generation: the same tokens as one by one, as transformers', and as the seed says."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import STATES, tiny_architecture
from helpers.tiny import PROMPTS, tiny_model, tiny_tokenizer

from rlcore.errors import UserError
from rlcore.models.forward import completion_logits
from rlcore.sampling import choosing, rollout
from rlcore.sampling.rollout import check_sampling, generate

KINDS = ["gpt2", "llama", "qwen2", "gemma2", "gemma3"]
NEW = 12


def greedy(model, prompts=PROMPTS, **options):
    return generate(
        model, tiny_tokenizer(), prompts, greedy=True, **{"max_new_tokens": NEW, **options}
    )


def kept(result) -> list[list[int]]:
    """Each row's counted tokens."""
    pairs = zip(result.completion_ids, result.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def one_by_one(model) -> list[list[int]]:
    return [kept(greedy(model, [prompt]))[0] for prompt in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_generates_what_each_prompt_does_alone(kind):
    model = tiny_model(kind)
    assert kept(greedy(model)) == one_by_one(model)


def test_a_batch_without_position_ids_would_generate_something_else(monkeypatch):
    model = tiny_model("gpt2")
    alone = one_by_one(model)
    monkeypatch.setattr(
        rollout, "position_ids", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape)
    )
    assert kept(greedy(model)) != alone


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_completions_are_those_of_transformers(kind):
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    result = greedy(model)
    encoded = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    theirs = model.generate(**encoded, max_new_tokens=NEW, do_sample=False)
    width = result.input_ids.shape[1]
    assert torch.equal(result.input_ids, theirs[:, :width])
    assert torch.all(theirs[:, width:] == tokenizer.pad_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_agrees_with_one_forward_pass(kind):
    model = tiny_model(kind)
    result = greedy(model)
    length = result.completion_ids.shape[1]
    logits = completion_logits(model, result.input_ids, result.attention_mask, length)
    likeliest = logits.argmax(-1)
    assert torch.equal(
        likeliest[result.completion_mask], result.completion_ids[result.completion_mask]
    )


def with_early_end(model) -> int:
    """Make an end token of what the model says third to the first prompt; returns it."""
    token = greedy(model).completion_ids[0, 2].item()
    model.generation_config.eos_token_id = [token]
    return token


def test_the_mask_holds_the_end_token_and_nothing_after_it():
    model = tiny_model()
    before = kept(greedy(model))
    end = with_early_end(model)
    result = greedy(model)
    for whole, cut, truncated in zip(before, kept(result), result.truncated, strict=True):
        assert cut == (whole[: whole.index(end) + 1] if end in whole else whole)
        assert bool(truncated) == (end not in whole)
    assert not result.truncated[0]
    pad = tiny_tokenizer().pad_token_id
    assert torch.all(result.completion_ids[~result.completion_mask] == pad)
    prompt_mask = result.attention_mask[:, : result.prompt_length]
    assert torch.equal(
        result.attention_mask, torch.cat([prompt_mask, result.completion_mask.long()], dim=1)
    )


def test_rows_that_ended_leave_the_batch_without_a_trace():
    model = tiny_model()
    with_early_end(model)
    prompts = [PROMPTS[0]] * 3 + PROMPTS
    assert kept(greedy(model, prompts)) == kept(greedy(model, prompts, full_length=True))


def test_ended_rows_cost_no_more_forward_passes(monkeypatch):
    model, sizes = tiny_model(), []
    with_early_end(model)
    forward = rollout._Decoder._forward

    def counted(self, input_ids, positions):
        sizes.append(len(input_ids))
        forward(self, input_ids, positions)

    monkeypatch.setattr(rollout._Decoder, "_forward", counted)
    greedy(model, [PROMPTS[0]] * 3)
    assert sizes == [3, 3, 3]  # the prompt and two tokens; the third token ended them all


def test_the_cache_is_filled_once_a_prompt(monkeypatch):
    sizes = []
    forward = rollout._Decoder._forward

    def counted(self, input_ids, positions):
        sizes.append(tuple(input_ids.shape))
        forward(self, input_ids, positions)

    monkeypatch.setattr(rollout._Decoder, "_forward", counted)
    result = generate(
        tiny_model(), tiny_tokenizer(), ["7", "8"], num_generations=5, max_new_tokens=2, seed=1
    )
    assert sizes == [(2, 1), (10, 1)]
    assert (
        result.input_ids[:, 0].tolist()
        == [result.input_ids[0, 0]] * 5 + [result.input_ids[5, 0]] * 5
    )


def sample(seed=0, **options):
    return generate(
        tiny_model(initializer_range=0.05),
        tiny_tokenizer(),
        PROMPTS,
        **{"num_generations": 3, "max_new_tokens": NEW, "seed": seed, **options},
    )


def test_a_seed_gives_the_same_completions_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first = sample()
    torch.rand(3)
    again, other = sample(), sample(seed=1)
    assert torch.equal(first.input_ids, again.input_ids)
    assert kept(first) != kept(other)
    torch.set_rng_state(state)
    drawn = torch.rand(1)
    torch.set_rng_state(state)
    sample()
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_the_narrowest_sampling_is_greedy(options):
    model = tiny_model()
    narrow = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW, **options)
    assert torch.equal(narrow.input_ids, greedy(model).input_ids)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_samples_follow_the_tempered_distribution(temperature):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    count = 4000
    result = generate(
        model, tokenizer, ["7"], num_generations=count, max_new_tokens=1, temperature=temperature
    )
    logits = completion_logits(model, result.input_ids, result.attention_mask, 1)[0, 0]
    probability = (logits / temperature).softmax(-1)
    frequency = torch.bincount(result.completion_ids[:, 0], minlength=len(probability)) / count
    # total variation of an honest sample is about sqrt(2 support / (pi count)) / 2
    distance = (frequency - probability).abs().sum() / 2
    support = probability.sqrt().sum() ** 2
    assert distance < 1.2 * (support / (2 * torch.pi * count)).sqrt() + 0.01


def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass():
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    kept_by = {
        (0.4, 0): [1],
        (0.41, 0): [1, 2],
        (0.71, 0): [1, 2, 3],
        (1.0, 2): [1, 2],
        # of the two likeliest, 0.4 / 0.7 = 0.57 holds half the mass alone
        (0.5, 2): [1],
    }
    for (top_p, top_k), tokens in kept_by.items():
        left = choosing.truncated(probabilities, top_p, top_k)
        assert left[0].nonzero().squeeze(1).tolist() == tokens
        assert torch.equal(left[0, tokens], probabilities[0, tokens])


def test_long_prompts_keep_their_last_tokens():
    result = greedy(tiny_model(), max_prompt_length=3)
    ids = tiny_tokenizer()(PROMPTS[0])["input_ids"]
    assert result.prompt_length == 3
    assert result.input_ids[0, :3].tolist() == ids[-3:]


def test_generation_leaves_the_model_in_the_mode_it_had():
    model = tiny_model().train()
    greedy(model)
    assert model.training


@pytest.mark.parametrize(
    "option", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_sampling_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        sample(**option)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        greedy(tiny_model(), [""])


@pytest.mark.parametrize("kind", STATES)
def test_models_with_states_are_sampled_from_in_batches_that_repeat_and_lose_rows(kind):
    model = tiny_architecture(kind)
    check_sampling(model)
    # an end that some rows come to early, so that rows leave the batch
    end = greedy(model).completion_ids[0, 2].item()
    model.generation_config.eos_token_id = [end]
    prompts = [PROMPTS[0], *PROMPTS]
    result = greedy(model, prompts, num_generations=2)
    alone = [kept(greedy(model, [prompt]))[0] for prompt in prompts]
    assert kept(result) == [ids for ids in alone for _ in range(2)]
    length = result.completion_ids.shape[1]
    logits = completion_logits(model, result.input_ids, result.attention_mask, length)
    mask = result.completion_mask
    assert torch.equal(logits.argmax(-1)[mask], result.completion_ids[mask])


@pytest.mark.parametrize(
    "kind, message",
    [("Rwkv", "RwkvForCausalLM gives no cache"), ("XLM", "XLMWithLMHeadModel gives no cache")],
)
def test_a_model_without_a_cache_is_refused_before_it_is_sampled_from(kind, message):
    with pytest.raises(UserError, match=message):
        check_sampling(tiny_architecture(kind))


def test_a_cache_that_loses_its_place_is_noticed(monkeypatch):
    model = tiny_model("gpt2")
    monkeypatch.setattr(
        rollout._Decoder, "keep", lambda self, rows: self.cache.reorder_cache(rows.flip(0))
    )
    with pytest.raises(UserError, match="cannot be sampled from a GPT2LMHeadModel"):
        check_sampling(model)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6, "temperature": 1.5}]
)
def test_every_token_comes_with_the_log_probability_that_it_was_drawn_with(options):
    model = tiny_model(initializer_range=0.05)
    model.generation_config.eos_token_id = list(range(5, 15))
    result = generate(
        model, tiny_tokenizer(), PROMPTS, num_generations=3, max_new_tokens=NEW, **options
    )
    length = result.completion_ids.shape[1]
    logits = completion_logits(model, result.input_ids, result.attention_mask, length)
    probabilities = (logits / options.get("temperature", 1.0)).softmax(-1)
    flat = choosing.truncated(
        probabilities.flatten(0, 1), options.get("top_p", 1.0), options.get("top_k", 0)
    )
    drawn_with = (flat / flat.sum(-1, keepdim=True)).view_as(probabilities)
    logp = drawn_with.gather(-1, result.completion_ids[..., None]).squeeze(-1).log()
    mask = result.completion_mask
    assert not mask.all()
    torch.testing.assert_close(result.sampling_logp[mask], logp[mask], rtol=0, atol=1e-5)
    assert torch.all(result.sampling_logp[~mask] == 0)


def test_a_greedy_token_comes_with_its_log_probability_under_the_model():
    model = tiny_model()
    result = greedy(model)
    length = result.completion_ids.shape[1]
    logits = completion_logits(model, result.input_ids, result.attention_mask, length)
    logp = logits.log_softmax(-1).gather(-1, result.completion_ids[..., None]).squeeze(-1)
    mask = result.completion_mask
    torch.testing.assert_close(result.sampling_logp[mask], logp[mask], rtol=0, atol=1e-5)
