"""Chat messages as the text that a tokenizer's template makes of them and of their tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcore.data.rows import Rows
from rlcore.data.tools import TOOLS, tools_of
from rlcore.errors import UserError, reason_of

_VARIABLES = "_rlcore_template_variables"  # of a tokenizer: what its template is given


def prompt_text(tokenizer: Any, prompt: str | list[dict]) -> str:
    """The prompt as one string: text stays, messages go through the tokenizer's chat template.

    The text of messages ends where the assistant is to write: in a turn of its own, or within the
    last message, where that is the assistant's already.

    Raises:
        UserError: messages, but a tokenizer without a chat template; a last message of the
            assistant's that has no text to go on from.
    """
    if isinstance(prompt, str):
        return prompt
    if not goes_on(prompt):
        return rendered(tokenizer, prompt, add_generation_prompt=True)
    try:
        if not prompt[-1].get("tool_calls"):
            return rendered(tokenizer, prompt, continue_final_message=True)
        reason = "it calls a tool"
    except ValueError as error:
        reason = reason_of(error)
    raise UserError(
        "a prompt ends with an assistant message that cannot be gone on from: end it with the "
        f"message before, or give plain text ({reason})"
    )


def goes_on(prompt: str | list[dict]) -> bool:
    """Whether a completion goes on where the prompt stops, and opens no turn of its own."""
    return isinstance(prompt, str) or prompt[-1]["role"] == "assistant"


def answer_text(tokenizer: Any, prompt: list[dict], completion: list[dict]) -> tuple[str, str]:
    """The prompt's text, and what the template writes behind it for the completion.

    Raises:
        UserError: the template writes the prompt differently once an answer follows, or the
            completion does not go on from the assistant message that the prompt ends with.
    """
    head = prompt_text(tokenizer, prompt)
    whole = rendered(tokenizer, _conversation(prompt, completion))
    if not whole.startswith(head):
        raise UserError(
            "the chat template writes the prompt differently once an answer follows, so prompt "
            "and completion cannot be told apart; give plain text instead"
        )
    return head, whole[len(head) :]


def _conversation(prompt: list[dict], completion: list[dict]) -> list[dict]:
    """All messages; the completion's first goes on in the assistant's turn that was begun."""
    if not goes_on(prompt):
        return prompt + completion
    begun = prompt[-1]
    texts = [message.get("content") for message in (begun, *completion[:1])]
    is_answer = [message["role"] for message in completion[:1]] == ["assistant"]
    if not is_answer or not all(isinstance(text, str) for text in texts):
        raise UserError(
            "the prompt ends with an assistant message, so the completion must go on with the "
            "text of another: end the prompt with the message before"
        )
    merged = {k: v for m in (begun, completion[0]) for k, v in m.items() if v is not None}
    answer = [merged | {"content": "".join(texts)}, *completion[1:]]
    return prompt[:-1] + answer


def rendered(tokenizer: Any, messages: list[dict], **options: Any) -> str:
    """What the template makes of the messages.

    Raises:
        UserError: there is no template.
    """
    _check_template(tokenizer)
    variables = _variables(tokenizer, messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, **variables, **options)


def marked(tokenizer: Any, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The same, and from where to where in it the template has {% generation %}.

    Raises:
        UserError: there is no template.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    _check_template(tokenizer)
    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=tokenizer.get_chat_template(tools=tools_of(messages)),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map | _variables(tokenizer, messages),
    )
    return text, spans


def notes_of_tools(tokenizer: Any, rows: Rows) -> tuple[str, ...]:
    """What to say of rows whose tools the template does not write."""
    known = TOOLS in str(tokenizer.chat_template)
    if known or not any(tools_of(rows[0].get(name)) for name in rows.group):
        return ()
    return (f"the rows have {TOOLS!r}, of which the chat template writes nothing",)


def _variables(tokenizer: Any, messages: list[dict]) -> dict[str, Any]:
    """What the template is given besides the messages: their tools, and what was set."""
    return {"tools": tools_of(messages)} | getattr(tokenizer, _VARIABLES, {})


def _check_template(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise UserError(
            f"the data holds chat messages, but the tokenizer {tokenizer.name_or_path!r} has no "
            "chat template: give plain text, or set tokenizer.chat_template and save it"
        )


def set_template_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """What the template is given besides the messages, whenever `rendered` uses it."""
    setattr(tokenizer, _VARIABLES, dict(variables))
