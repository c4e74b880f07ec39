"""rl.fused_head: in a loop of one's own, losses past the logits are those through them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import sharded_model
from helpers.tiny import tiny_model, tiny_tokenizer

import rlcore as rl
from rlcore.data.encoding import pad
from rlcore.errors import UserError
from rlcore.models.adapters import add_lora

KINDS = ("gpt2", "llama", "qwen2", "gemma2", "gemma3")


def a_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, labels) (3, 9): a row padded left, one right, a prompt of 3."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (3, 9), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    attention[1, -2:] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :3] = -100
    return ids, attention, labels


def through_logits(model, ids, attention) -> torch.Tensor:
    """(B, T-1, V), with positions that count attended tokens only."""
    options = {"position_ids": (attention.cumsum(-1) - 1).clamp(min=0)}
    return model(ids, attention_mask=attention, **options).logits[:, :-1]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        scale = want[name].abs().max()
        assert (gradient - want[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_entropies_and_their_gradients_are_the_logits(kind):
    model = tiny_model(kind)
    ids, attention, labels = a_batch()
    mask = labels[:, 1:] != -100
    out = rl.fused_head(model)(ids, attention, labels=labels, temperature=0.7)
    logits = through_logits(model, ids, attention)
    want = rl.token_logprob(logits, ids[:, 1:], mask=mask, temperature=0.7)
    assert out.logp.shape == (3, 8)
    assert not out.logp[~mask].any()
    for mine, theirs in zip(out, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)
    losses = [(each.logp - 0.3 * each.entropy).sum() for each in (out, want)]
    assert_same(*(gradients(model, loss) for loss in losses))


def test_the_policy_loss_is_the_one_through_the_logits():
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    ids, attention, labels = a_batch()
    head = rl.fused_head(model)
    advantage = torch.tensor([1.0, -0.5, 2.0])
    old = head(ids, attention, labels=labels).logp.detach() + 0.1
    options = {"old_logp": old, "entropy_coef": 0.1, "loss_agg_mode": "seq-mean-token-mean"}
    fused = head.policy_loss(ids, advantage, attention, labels=labels, **options).loss
    logits = through_logits(model, ids, attention)
    want = rl.policy_loss(logits, ids[:, 1:], advantage, mask=labels[:, 1:] != -100, **options).loss
    torch.testing.assert_close(fused, want, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, fused), gradients(model, want))


def test_the_preference_loss_is_that_of_the_summed_logprobs():
    model = tiny_model("qwen2")
    ids, attention, labels = (tensor[:2] for tensor in a_batch())
    head = rl.fused_head(model)
    reference = torch.tensor([-30.0, -25.0])
    loss = head.preference_loss(ids, attention, labels=labels, ref_logp=reference).loss
    chosen, rejected = head(ids, attention, labels=labels).logp.sum(1).split(1)
    want = rl.preference_loss(chosen, rejected, reference[:1], reference[1:]).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, loss), gradients(model, want))


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_rows_first_token_counts_on_neither_side_of_padding(labelled):
    model = tiny_model()
    rows = [[7, 30, 5, 9, 41], [12, 8, 3]]
    alone = [
        rl.token_logprob(model(torch.tensor([row])).logits[:, :-1], torch.tensor([row])[:, 1:])
        for row in rows
    ]
    for side in ("left", "right"):
        ids, attention = pad(rows, 0, side), pad([[1] * len(row) for row in rows], 0, side)
        labels = ids.masked_fill(attention == 0, -100) if labelled else None
        head = rl.fused_head(model)
        out = head(ids, attention, labels=labels)
        for got, want in zip(out.logp, alone, strict=True):
            torch.testing.assert_close(got.sum(), want.logp.sum(), rtol=1e-5, atol=1e-5)
        loss = head.policy_loss(
            ids, torch.ones(2), attention, labels=labels, surrogate="reinforce", num_items=1
        ).loss
        expected = -sum(want.logp.sum() for want in alone)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_gives_the_same_and_compiles_once(in_place):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny_model()
    ids, attention, labels = a_batch()
    want = rl.fused_head(model)(ids, attention, labels=labels).logp
    compiled = model if in_place else torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
    head = rl.fused_head(compiled)
    first = head(ids, attention, labels=labels).logp
    count = len(graphs)
    second = head(ids, attention, labels=labels).logp
    torch._dynamo.reset()
    assert count > 0 and len(graphs) == count
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(second, want)


def test_an_fsdp2_model_gets_the_mean_gradient_of_all_ranks_however_it_is_sharded(tmp_path):
    script = Path(__file__).parent / "helpers" / "sharded_model.py"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
    for way in sharded_model.WAYS:
        model = sharded_model.make_model(way)
        losses = [sharded_model.loss_of(model, rank) for rank in range(2)]
        want = gradients(model, sum(losses) / 2)
        for rank, loss in enumerate(losses):
            result = torch.load(tmp_path / f"rank{rank}.pt")[way]
            torch.testing.assert_close(result["loss"], loss.detach())
            assert_same(result["gradients"], want)


def test_a_lora_adapter_beside_other_layers_is_trained_and_one_on_the_head_refused():
    ids, attention, labels = a_batch()
    model = tiny_model("llama", tie_word_embeddings=False)
    add_lora(model, r=2, alpha=4.0)
    trained = gradients(model, rl.fused_head(model)(ids, attention, labels=labels).logp.sum())
    assert trained and all("lora" in name for name in trained)
    model = tiny_model("llama", tie_word_embeddings=False)
    add_lora(model, r=2, alpha=4.0, target_modules=("lm_head",))
    with pytest.raises(UserError, match="not a plain linear layer"):
        rl.fused_head(model)


def test_a_peft_model_around_the_model_is_taken():
    from peft import LoraConfig, get_peft_model

    ids, attention, labels = a_batch()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    out = rl.fused_head(model)(ids, attention, labels=labels)
    logits = through_logits(model, ids, attention)
    want = rl.token_logprob(logits, ids[:, 1:], mask=labels[:, 1:] != -100)
    torch.testing.assert_close(out.logp, want.logp, rtol=1e-5, atol=2e-5)


def test_a_model_that_does_more_to_its_logits_is_refused(monkeypatch):
    model = tiny_model()
    plain = type(model).forward

    def louder(self, *args, **options):
        outputs = plain(self, *args, **options)
        outputs.logits = outputs.logits * 1.5
        return outputs

    monkeypatch.setattr(type(model), "forward", louder)
    with pytest.raises(UserError, match="more to its logits"):
        rl.fused_head(model)


def test_a_cap_under_an_unknown_name_is_noticed_though_all_logits_are_small(monkeypatch):
    model = tiny_model("llama", initializer_range=0.02)
    plain = type(model).forward

    def capped(self, *args, **options):
        outputs = plain(self, *args, **options)
        outputs.logits = 30.0 * torch.tanh(outputs.logits / 30.0)
        return outputs

    monkeypatch.setattr(type(model), "forward", capped)
    ids = a_batch()[0]
    assert model(ids).logits.abs().max() < 1
    with pytest.raises(UserError, match="more to its logits"):
        rl.fused_head(model)


def tiny_capped(kind: str):
    """A model whose configuration calls its cap something else, freshly initialised."""
    import transformers

    vocabulary = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "eos_token_id": 1}
    if kind == "RecurrentGemma":
        config = transformers.RecurrentGemmaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=1, head_dim=8, lru_width=32, attention_window_size=8, **vocabulary,
        )  # fmt: skip
    else:
        config = transformers.Gemma3TextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0, **vocabulary,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind, cap", [("RecurrentGemma", 30.0), ("Gemma3", 5.0)])
def test_a_cap_is_applied_by_whatever_name_it_goes(kind, cap):
    model = tiny_capped(kind)
    layer = model.get_output_embeddings()
    head = rl.fused_head(model)
    assert head.head.softcap == cap
    ids, attention, labels = a_batch()
    # far beyond the cap, where leaving it out would show
    hook = layer.register_forward_pre_hook(lambda _, inputs: (1e4 * inputs[0],))
    out = head(ids, attention, labels=labels)
    logits = through_logits(model, ids, attention)
    hook.remove()
    assert logits.abs().max() > 0.9 * cap
    want = rl.token_logprob(logits, ids[:, 1:], mask=labels[:, 1:] != -100)
    torch.testing.assert_close(out.logp, want.logp, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fails", [False, True], ids=["fits", "raises"])
def test_every_layer_keeps_the_mode_it_had_whatever_becomes_of_the_probe(monkeypatch, fails):
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    if fails:

        def broken(*_, **__):
            raise RuntimeError("no kernel for this")

        monkeypatch.setattr(type(model.model), "forward", broken)
        with pytest.raises((UserError, RuntimeError), match="no kernel for this"):
            rl.fused_head(model)
    else:
        rl.fused_head(model)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_model_that_reads_later_tokens_is_refused():
    import transformers

    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"not causal.*BertLMHeadModel"):
        rl.fused_head(transformers.BertLMHeadModel(config))


def test_the_readmes_loss_from_hidden_states_is_the_models():
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    block = readme.split("```python\n")[2].split("```")[0]
    model = tiny_model("llama")
    ids, attention, labels = a_batch()
    ids, attention, mask = ids[2:], attention[2:], labels[2:] != -100
    advantage, old_logp = torch.tensor([0.7]), torch.full((1, 8), -3.0)
    hidden = model.model(ids).last_hidden_state
    names = dict(rl=rl, model=model, hidden=hidden, input_ids=ids, completion_mask=mask)
    names |= dict(advantage=advantage, old_logp=old_logp, logits=model(ids).logits)
    first, second = block.split("options = ")
    exec(first, names)
    labels = ids.masked_fill(~mask, -100)
    head = rl.fused_head(model)
    want = head.policy_loss(ids, advantage, labels=labels, old_logp=old_logp).loss
    torch.testing.assert_close(names["out"].loss, want, rtol=1e-5, atol=1e-6)
    exec(f"options = {second}", names)
    torch.testing.assert_close(names["out"].loss, want, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_named():
    head = rl.fused_head(tiny_model())
    ids, attention, labels = a_batch()
    with pytest.raises(ValueError, match=r"labels \(3, 8\)"):
        head(ids, attention, labels=labels[:, 1:])
    with pytest.raises(ValueError, match=r"attention_mask \(2, 9\)"):
        head.policy_loss(ids, torch.ones(3), attention[:2])
    with pytest.raises(ValueError, match="at least 2"):
        head(ids[:, :1])
