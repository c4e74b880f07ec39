"""Value models: which state each value is of, where they start, and what cannot be one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import actor_critic as make
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from rlcore.errors import UserError
from rlcore.models.heads import choose_head
from rlcore.models.value_model import ValueModel, load_value_model
from rlcore.trainers.shared.critic import Critic, load_critic, predict_values


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((actual.double() - expected.double()).abs().max() < tolerance)


@pytest.mark.parametrize("batch", [8, 3])
@pytest.mark.parametrize("kind", make.KINDS)
def test_a_value_is_that_of_the_state_before_the_token(tmp_path, kind, batch):
    made = make.experience()
    run, critic = make.make_run(make.ppo_config(tmp_path, per_device_train_batch_size=batch), kind)
    values, last = predict_values(run, critic, made)
    states = make.naive_states(make.tiny_classifier(kind), made)
    expected = make.naive_values(make.tiny_classifier(kind), made)
    assert close(values[made.mask], expected[made.mask])
    assert expected[made.mask].std() > 0.1
    assert torch.all(values[~made.mask] == 0)
    ends = made.attention_mask.shape[1] - 1 - made.attention_mask.flip(1).argmax(1)
    assert close(last, states.gather(1, ends[:, None]).squeeze(1))


def test_a_value_knows_nothing_of_its_own_token(tmp_path):
    made = make.experience()
    run, critic = make.make_run(make.ppo_config(tmp_path))
    values, last = predict_values(run, critic, made)
    changed = dataclasses.replace(made, input_ids=made.input_ids.clone())
    changed.input_ids[:, -3] += 1
    others, other_last = predict_values(run, critic, changed)
    assert close(others[:, :3], values[:, :3])
    longer = made.mask[:, 3]
    assert not torch.isclose(others[longer, 3], values[longer, 3]).any()
    assert not torch.isclose(other_last[longer], last[longer]).any()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("kind", make.KINDS)
def test_a_head_on_the_policys_backbone_reads_its_last_hidden_states(tmp_path, kind, fused):
    made = make.experience()
    run, critic = make.make_run(make.ppo_config(tmp_path, value_backbone="shared"), kind)
    run.head, note = choose_head(run.policy, fused)
    assert note is None
    values, last = predict_values(run, critic, made)
    expected = make.naive_hidden_values(tiny_model(kind), make.tiny_head(), made)
    assert close(values[made.mask], expected[made.mask])
    # after the last token: what one more token would have found
    longer = dataclasses.replace(
        made,
        input_ids=torch.cat([made.input_ids, made.input_ids[:, :1]], 1),
        attention_mask=torch.cat([made.attention_mask, made.attention_mask[:, -1:]], 1),
        mask=torch.cat([made.mask, made.mask[:, -1:]], 1),
    )
    full = made.attention_mask[:, -1].bool()
    after = make.naive_hidden_values(tiny_model(kind), make.tiny_head(), longer)[:, -1]
    assert full.sum() == 2 and close(last[full], after[full])


@pytest.mark.parametrize("backbone", ["own", "shared"])
def test_padding_columns_change_no_value(tmp_path, backbone):
    made = make.experience()
    run, critic = make.make_run(make.ppo_config(tmp_path, value_backbone=backbone))
    values, last = predict_values(run, critic, made)
    wider, wider_last = predict_values(run, critic, make.padded(made))
    assert close(wider[:, :-2], values, 1e-5) and close(wider_last, last, 1e-5)
    assert torch.all(wider[:, -2:] == 0)


@pytest.mark.parametrize("kind", make.KINDS)
def test_from_a_policy_a_value_model_starts_at_zero_on_its_backbone(tmp_path, kind):
    path = save_tiny(tmp_path / "policy", kind)
    model = load_value_model(path, tiny_tokenizer())
    made = make.experience()
    assert torch.all(model(made.input_ids, made.attention_mask) == 0)
    policy = tiny_model(kind).base_model.state_dict()
    backbone = model.classifier.base_model.state_dict()
    assert policy.keys() == backbone.keys()
    assert all(torch.equal(value, policy[name]) for name, value in backbone.items())


def test_from_a_reward_model_it_starts_with_its_scores(tmp_path):
    make.tiny_classifier("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, made = load_value_model(str(tmp_path), tiny_tokenizer()), make.experience()
    expected = make.naive_states(make.tiny_classifier("llama"), made)
    attended = made.attention_mask.bool()
    assert close(model(made.input_ids, made.attention_mask)[attended], expected[attended])


def test_what_is_saved_is_a_classifier_that_the_next_run_starts_from(tmp_path):
    config = make.ppo_config(tmp_path, model=save_tiny(tmp_path / "policy"))
    run, _ = make.make_run(config, "qwen2")
    critic = Critic(ValueModel(make.tiny_classifier("qwen2")), config)
    critic.prepare(run)
    critic.save(tmp_path)
    saved = str(tmp_path / "value_model")
    assert AutoModelForSequenceClassification.from_pretrained(saved).config.num_labels == 1
    again = load_critic(dataclasses.replace(config, value_model=saved), run.policy, run.tokenizer)
    for name, value in critic.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_value_head_that_cannot_be_written_leaves_the_older_one_whole(tmp_path, monkeypatch):
    _, critic = make.make_run(make.ppo_config(tmp_path, value_backbone="shared"))
    critic.save(tmp_path)
    before = (tmp_path / "value_head.safetensors").read_bytes()

    def half(tensors, path):
        Path(path).write_bytes(before[:20])
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(UserError, match=r"cannot write .*value_head.safetensors: .*No space left"):
        critic.save(tmp_path)
    assert (tmp_path / "value_head.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["value_head.safetensors"]


def test_the_values_stay_in_float32_under_autocast():
    model, made = ValueModel(make.tiny_classifier("qwen2")), make.experience()
    with torch.autocast("cpu", torch.bfloat16):
        values = model(made.input_ids, made.attention_mask)
    assert values.dtype == torch.float32
    fine = values != values.bfloat16().float()
    assert fine.float().mean() > 0.5


def test_a_model_that_reads_other_tokens_is_refused(tmp_path):
    path = save_tiny(tmp_path / "policy")
    other = tiny_tokenizer().__class__.from_pretrained(path)
    other.add_tokens(["pineapple"])
    with pytest.raises(UserError, match=r"value_model '.*policy' has another tokenizer"):
        load_value_model(path, other)


def test_a_model_without_a_usable_head_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertForSequenceClassification, which gives no"):
        load_value_model(str(tmp_path), tiny_tokenizer())
