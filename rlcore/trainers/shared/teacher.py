"""The teacher of a distillation: loaded, compared with the student, and asked."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.errors import UserError
from rlcore.kernels.head.divergence import linear_categorical_divergence
from rlcore.kernels.rows.categorical_divergence import categorical_divergence
from rlcore.models.heads import Completions, FusedHead, LogitsHead
from rlcore.models.loading import check_tokenizer, load_reference
from rlcore.trainers.options.distill import DistillConfig
from rlcore.trainers.shared.policies import Policy
from rlcore.trainers.shared.run import Run


def load_teacher(config: DistillConfig, tokenizer: Any, student: Any) -> Any:
    """The frozen teacher, which has the student's words.

    Raises:
        UserError: nothing loadable there, another tokenizer, or fewer words than it has.
    """
    if isinstance(config.teacher, str):
        check_tokenizer("teacher", config.teacher, tokenizer, config.trust_remote_code)
    teacher = load_reference(config.teacher, **config.loading)
    own, others = (len(model.get_output_embeddings().weight) for model in (student, teacher))
    if own != others and min(own, others) < len(tokenizer):
        raise UserError(
            f"teacher has a head of {others} tokens and the model one of {own}, and the tokenizer "
            f"has {len(tokenizer)}: choose a teacher with the model's vocabulary"
        )
    return teacher


def teacher_divergence(
    run: Run,
    teacher: Policy,
    batch: Completions,
    *,
    num_items: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """(B, C) divergences of student and teacher after each token's prefix, 0 where masked.

    With `num_items` their sum over it, whose gradient costs one pass.

    Past the logits where both heads allow it. Rows that the one head has beyond the other's, by
    which a family pads its vocabularies to round numbers, are no words and are left out.

    Args:
        options: kind, jsd_beta and temperature of `rl.categorical_divergence`.
    """
    heads = [run.head, teacher.head]
    fused = all(isinstance(head, FusedHead) for head in heads)
    if not fused:
        heads = [LogitsHead(), LogitsHead()]
    with torch.no_grad(), teacher.asked():
        theirs = heads[1].read(teacher.model, batch)
    ours, options = heads[0].read(run.model, batch), {"mask": batch.mask} | options
    if not fused:
        words = min(ours.shape[-1], theirs.shape[-1])
        divergence = categorical_divergence(ours[..., :words], theirs[..., :words], **options)
        return divergence if num_items is None else divergence.sum() / num_items
    words = min(len(head.layer.weight) for head in heads)
    (weight, own), (other_weight, others) = (head.of_words(words) for head in heads)
    others = {f"other_{name}": value for name, value in others.items()}
    return linear_categorical_divergence(
        ours, weight, theirs, other_weight.detach(), num_items=num_items, **own, **others, **options
    )
