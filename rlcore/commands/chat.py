"""`rlcore chat`: a conversation with a model in the terminal, answers as they are written.

Where the tokenizer has a chat template the lines are a conversation; where it has none each line
is a text to be completed. Read from a pipe, every line gets its answer, and that is all.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rlcore.data.encoding import encode_prompts
from rlcore.data.ends import end_tokens
from rlcore.errors import UserError
from rlcore.models.limits import context_window
from rlcore.models.loading import load_policy, load_tokenizer
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Count, Natural, NotNegative, Seed, Share
from rlcore.sampling.rewards import check_columns, compute_rewards
from rlcore.trainers.options.load import LoadConfig, check_load_config
from rlcore.trainers.options.reward import RewardConfig
from rlcore.trainers.shared.judging import Judge, make_judge

PROMPT = "> "


@dataclass(kw_only=True)
class ChatConfig(RewardConfig, LoadConfig, Checked):
    """Conversation."""

    model: str  # directory or hub name: a model, a checkpoint or an adapter
    system: str | None = None  # the system message of the conversation
    temperature: NotNegative = 1.0  # of sampling; 0: the likeliest token
    top_p: Share = 1.0  # sample from the likeliest tokens of this mass
    top_k: Natural = 0  # sample from this many of the likeliest tokens; 0: all
    max_completion_length: Count = 512  # new tokens at most
    seed: Seed = 0  # of the sampling


def chat(config: ChatConfig, lines: Iterator[str] | None = None) -> None:
    """Answer `lines`, by default what is typed or piped in, until they end.

    Raises:
        UserError: options, a model or a reward that do not work here.
    """
    check_load_config(config)
    judge = make_judge(config)
    check_columns(judge.functions, ["prompt"], "rlcore chat")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.model, **config.reading)
    if config.system is not None and not tokenizer.chat_template:
        raise UserError(
            f"system is set, but the tokenizer of {config.model!r} has no chat template: a text to "
            "be completed has no system message"
        )
    judge.prepare(tokenizer, device)
    model = load_policy(config.model, dropout=False, **config.loading).to(device).eval()
    torch.manual_seed(config.seed)
    if lines is None:
        lines = _typed(bool(tokenizer.chat_template)) if sys.stdin.isatty() else iter(sys.stdin)
    beginning = [] if config.system is None else [{"role": "system", "content": config.system}]
    messages = list(beginning)
    for line in lines:
        text = line.rstrip("\n")
        if text == "/quit":
            break
        if text == "/new":
            messages = list(beginning)
        if not text or text == "/new":
            continue
        prompt: Any = text
        if tokenizer.chat_template:
            prompt = [*messages, {"role": "user", "content": text}]
        answered = _answer(config, model, tokenizer, prompt)
        if answered is None:
            continue
        if tokenizer.chat_template:
            messages = [*prompt, {"role": "assistant", "content": answered[0]}]
        if judge.functions:
            print(_score(judge, prompt, *answered), flush=True)


def _typed(is_conversation: bool) -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D or Ctrl-C."""
    import readline  # noqa: F401 - gives input() its history and arrow keys

    kind = "a conversation: /new begins another" if is_conversation else "each line is completed"
    print(f"{kind}; /quit or Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _answer(
    config: ChatConfig, model: Any, tokenizer: Any, prompt: Any
) -> tuple[str, list[int]] | None:
    """The model's answer, shown as it is written, and its tokens; Ctrl-C ends it where it is.

    None where there is no room for one.
    """
    from transformers import TextStreamer

    (ids,) = encode_prompts(tokenizer, [prompt], None)
    room = (context_window(model.config) or math.inf) - len(ids)
    if room < 1:
        print(f"no room for an answer: {len(ids)} tokens fill the model's positions", flush=True)
        return None
    tokens: list[int] = []

    class Streamer(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            tokens.extend(value.flatten().tolist())
            super().put(value)

    input_ids = torch.tensor([ids], device=model.device)
    with contextlib.suppress(KeyboardInterrupt):
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=int(min(config.max_completion_length, room)),
            eos_token_id=end_tokens(model, tokenizer).tolist(),
            pad_token_id=tokenizer.pad_token_id,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **_sampling(config),
        )
    del tokens[: len(ids)]  # it is given the prompt first
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


def _sampling(config: ChatConfig) -> dict[str, Any]:
    if config.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
    }


def _score(judge: Judge, prompt: Any, answer: str, tokens: list[int]) -> str:
    """The answer's reward, and its parts where there are several."""
    rewards = compute_rewards(
        judge.functions, judge.weights, [prompt], [answer], {}, completion_ids=[tokens]
    )
    line = f"reward {rewards.total.item():.3f}"
    if len(judge.names) > 1:
        parts = zip(judge.names, rewards.per_function[0].tolist(), strict=True)
        line += f" ({', '.join(f'{name} {value:.3f}' for name, value in parts)})"
    return line
