"""The load-balancing loss of a mixture of experts, had from the passes that train it.

    aux = E * sum over experts e of f_e * P_e

f_e is the share of choices that fall on e, P_e its mean probability (Switch Transformers,
arXiv:2101.03961, equations 4 to 6). It is transformers' own for the model, over the tokens of a
pass that are no padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from rlcore.errors import UserError
from rlcore.models.forward import forward_options

_FUNCTION = "load_balancing_loss_func"  # of transformers' modules of models with experts


class RouterLoss:
    """Collects a model's load-balancing losses; those of passes that no gradient goes through not.

    Args:
        model: a causal language model or a sequence classifier, not wrapped.
        coef: what `take` multiplies them with.

    Raises:
        UserError: a model without experts, or without such a loss.
    """

    def __init__(self, model: Any, coef: float):
        self.coef = coef
        self._seen: list[torch.Tensor] = []
        if "output_router_logits" in forward_options(model):
            part, self._loss_of = model, lambda outputs, mask: outputs.aux_loss
        else:
            # a classifier drops what its backbone gives
            part, self._loss_of = model.base_model, _of_backbone(model)
        part.register_forward_pre_hook(self._ask, with_kwargs=True)
        part.register_forward_hook(self._keep, with_kwargs=True)

    def take(self) -> torch.Tensor | None:
        """coef times the mean loss of the passes since it was taken last; None where none was."""
        seen, self._seen = self._seen, []
        return self.coef * torch.stack(seen).mean() if seen else None

    def _ask(self, module: Any, inputs: tuple, options: dict[str, Any]) -> tuple | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        return inputs, options | {"output_router_logits": True}

    def _keep(self, module: Any, inputs: tuple, options: dict[str, Any], outputs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._seen.append(self._loss_of(outputs, options.get("attention_mask")))


def _of_backbone(model: Any) -> Callable[[Any, torch.Tensor | None], torch.Tensor]:
    """The loss of what a backbone gives, by the function beside its class."""
    config = model.config.get_text_config()
    function = getattr(sys.modules[type(model.base_model).__module__], _FUNCTION, None)
    names = ("num_local_experts", "num_experts")
    experts = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    choices = getattr(config, "num_experts_per_tok", None)
    if function is None or experts is None or choices is None:
        raise UserError(
            f"router_aux_loss_coef is set, but a {type(model).__name__} has no experts to balance, "
            "or no loss that does it: leave it out"
        )
    return lambda outputs, mask: function(outputs.router_logits, experts, choices, mask)
