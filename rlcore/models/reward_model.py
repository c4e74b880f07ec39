"""Reward models: a sequence classifier's one score of prompt and completion, at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call

from rlcore.data.encoding import Example, collate, encode_completions, encode_prompts, up_to_end
from rlcore.data.ends import completion_end
from rlcore.errors import UserError
from rlcore.models.adapters import NEW_HEAD
from rlcore.models.forward import forward_options, position_ids
from rlcore.models.loading import check_tokenizer, load_classifier

BATCH = 64


def sequence_scores(
    model: Any, classifier: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """(B,) float32 scores at each row's last attended token.

    transformers would look for the last token that is no padding, and pass over an eos that doubles
    as padding.

    Args:
        model: the classifier as prepared, perhaps wrapped; `classifier`: the same without wrappers.
        input_ids, attention_mask: (B, T), padding on either side.
    """
    head = getattr(classifier, NEW_HEAD)
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in forward_options(model):
        arguments["position_ids"] = position_ids(attention_mask)
    try:
        model(input_ids, **arguments)
    finally:
        hook.remove()
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (columns * attention_mask.bool()).argmax(1)
    hidden = seen[-1][torch.arange(len(last), device=last.device), last]
    # scores are told apart by little, which half precision would round away
    weights = {name: parameter.float() for name, parameter in head.named_parameters()}
    with torch.autocast(hidden.device.type, enabled=False):
        return functional_call(head, weights, (hidden.float(),)).squeeze(-1)


class RewardModel:
    """A reward function that asks a trained reward model.

    Args:
        path: its directory or hub name.
    """

    __name__ = "reward_model"

    def __init__(self, path: str):
        self.path = path
        self.model = self.tokenizer = self.policy_tokenizer = None

    def prepare(self, tokenizer: Any, device: torch.device) -> None:
        """Load it for a policy that reads and writes with `tokenizer`.

        Raises:
            UserError: nothing loadable there, a model without a score, another tokenizer.
        """
        own = check_tokenizer("reward_model", self.path, tokenizer)
        model = load_classifier(self.path, dropout=False)
        # transformers looks for padding by it, and refuses a batch without
        model.config.get_text_config().pad_token_id = own.pad_token_id
        # its own template, bos and ends are what it was trained with
        own.chat_template = own.chat_template or tokenizer.chat_template
        self.tokenizer, self.policy_tokenizer = own, tokenizer
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str | list[dict]],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        """The score of each prompt with its completion.

        `completion_ids` are the tokens as sampled, up to the end where it came; without them each
        completion is taken to have ended.
        """
        if self.model is None:
            raise UserError(f"reward_model {self.path!r} is not loaded: call prepare first")
        rows = self.examples(prompts, completions, completion_ids)
        scores = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = collate([rows[place] for place in places], self.tokenizer.pad_token_id)
            batch = batch.to(device)
            scores[places] = sequence_scores(
                self.model, self.model, batch.input_ids, batch.attention_mask
            ).cpu()
        return scores.tolist()

    def examples(
        self,
        prompts: Sequence[str | list[dict]],
        completions: Sequence[str | list[dict]],
        completion_ids: Sequence[list[int]] | None = None,
    ) -> list[Example]:
        """The tokens that are judged: those that the model would have been trained on.

        Prompts and ends are therefore written as the model's own tokenizer writes them.
        """
        if completion_ids is not None:
            learned, sampled = (
                {text: completion_end(tokenizer, text) for text in (True, False)}
                for tokenizer in (self.tokenizer, self.policy_tokenizer)
            )
            heads = encode_prompts(self.tokenizer, prompts)
            examples = []
            for head, prompt, ids in zip(heads, prompts, completion_ids, strict=True):
                text = isinstance(prompt, str)
                ended = list(ids[-1:]) == [sampled[text]]
                examples.append(Example(head, [*ids[:-1], learned[text]] if ended else [*ids]))
            return examples
        pairs = zip(prompts, completions, strict=True)
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        examples = encode_completions(self.tokenizer, rows)
        if None in examples:
            raise UserError("a completion without any token has no score")
        return [up_to_end(self.tokenizer, example) for example in examples]
