"""The reward for code: programs that run, or pass the row's tests, in a sandbox.

    1.0 where sandbox(program, tests, seconds) is true, else 0.0

The program is the completion's last fenced block of Python, or the whole completion. The default
sandbox is `rlcore.sampling.sandbox.passes`; docs/code_rewards.md says what it holds off and what
not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlcore.errors import UserError
from rlcore.sampling import sandbox
from rlcore.sampling.user_code import import_function

# (program, tests, seconds) -> whether the program passes; called from several threads at a time
Sandbox = Callable[[str, str, float], bool]
CODE_SECONDS = 5.0


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, be it text or messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def code_runs(
    prompts: list,
    completions: list,
    tests: Sequence[str | list[str] | None] | None = None,
    **_: Any,
) -> list[float]:
    """1.0 where the completion's Python code passes the column `tests`; without, where it runs.

    Tests are Python that names what the program defines: assert statements, `def test...()`, a
    unittest.TestCase, or a list of such. They run in another process than the program, after it.
    As many programs run at a time as there are cores, each for CODE_SECONDS of wall time at most.
    """
    return _judged(sandbox.passes, completions, tests)


def code_runs_in(name: str) -> Callable[..., list[float]]:
    """`code_runs` with the user's own sandbox, the function at "package.module:function"."""
    own = import_function("code_sandbox", name)

    def code_runs(
        prompts: list, completions: list, tests: Sequence | None = None, **_: Any
    ) -> list[float]:
        return _judged(own, completions, tests)

    return code_runs


def _judged(passes: Sandbox, completions: list, tests: Sequence | None) -> list[float]:
    programs = [_last_code_block(completion_text(completion)) for completion in completions]
    sources = [_source(row) for row in tests or [None] * len(completions)]

    def judge(program: str, source: str) -> float:
        verdict = passes(program, source, CODE_SECONDS)
        if not isinstance(verdict, bool):
            raise UserError(f"a code_sandbox returns True or False, not {verdict!r}")
        return float(verdict)

    if len(sources) != len(programs):
        raise UserError(f"{len(sources)} tests came for {len(programs)} completions")
    with ThreadPoolExecutor(sandbox.cores()) as pool:
        return list(pool.map(judge, programs, sources))


def _source(tests: str | list[str] | None) -> str:
    return tests or "" if isinstance(tests, str | None) else "\n".join(tests)


def _last_code_block(text: str) -> str:
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text
