"""The cases: operation x direction x dtype x shape, one table for benchmarks and tests alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlcore.errors import unknown_name

# Llama 2, GPT-2, Llama 3, Qwen 2.5 and Gemma 3
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DIRECTIONS = ("forward", "backward", "forward+backward")
BOTH = "forward+backward"
SIZES = ("N", "V", "H", "B", "T")


@dataclass(frozen=True)
class Case:
    """What is computed: N tokens (B sequences of T), V vocabulary, H hidden; 0 where it has none.

    `masked` is the share of every sequence, at its end, that does not count.
    """

    op: str
    direction: str
    dtype: str
    N: int = 0
    V: int = 0
    H: int = 0
    B: int = 0
    T: int = 0
    masked: float = 0.0

    @property
    def shape(self) -> str:
        sizes = ",".join(f"{name}={getattr(self, name)}" for name in SIZES if getattr(self, name))
        return sizes + (f",masked={self.masked:g}" if self.masked else "")

    @property
    def key(self) -> str:
        """The case's name in results, commands and tables; `parse` reads it back."""
        return f"{self.op}/{self.direction}/{self.dtype}/{self.shape}"

    @property
    def counted(self) -> int:
        """Tokens that are not masked."""
        return self.B * (self.T - int(self.masked * self.T)) if self.masked else self.N

    @classmethod
    def parse(cls, key: str) -> Case:
        op, direction, dtype, shape = key.split("/")
        sizes = dict(part.split("=") for part in shape.split(","))
        masked = float(sizes.pop("masked", 0))
        return cls(op, direction, dtype, **{k: int(v) for k, v in sizes.items()}, masked=masked)


def rows(
    op: str, dtype: str, tokens: int, vocabulary: int, direction: str = BOTH, sequences: int = 8
) -> Case:
    """An operation on logits (N, V), the tokens in `sequences` rows of equal length."""
    sequences = min(sequences, tokens)
    return Case(op, direction, dtype, N=tokens, V=vocabulary, B=sequences, T=tokens // sequences)


def head(
    op: str, dtype: str, tokens: int, hidden: int, vocabulary: int, masked: float = 0.0
) -> Case:
    """An operation on hidden (N, H) and weight (V, H), loss and gradients."""
    sequences = min(8, tokens)
    length = tokens // sequences
    return Case(op, BOTH, dtype, tokens, vocabulary, hidden, sequences, length, masked)


def scan(op: str, sequences: int, length: int) -> Case:
    """An operation on rewards and values (B, T)."""
    return Case(op, "forward", "float32", B=sequences, T=length)


LOGIT_OPS = ("token_logprob", "token_logp", "policy_loss", "sequence_policy_loss")
LOGIT_OPS += ("cross_entropy", "categorical_kl")
HEAD_OPS = ("linear_token_logprob", "linear_policy_loss", "linear_cross_entropy", "linear_dpo")


def check() -> Iterator[Case]:
    """Every operation, small: what is wrong shows in seconds; times at these sizes say nothing."""
    for dtype in ("float32", "bfloat16"):
        for op in LOGIT_OPS:
            yield rows(op, dtype, 16, 1031)
        yield rows("fisher_vector_product", dtype, 16, 1031, "forward")
        for op in HEAD_OPS:
            yield head(op, dtype, 32, 64, 517, masked=0.25)
    yield scan("gae", 8, 200)


def cpu() -> Iterator[Case]:
    """Sizes that one core serves in seconds."""
    for dtype in ("bfloat16", "float32"):
        for op in ("token_logprob", "policy_loss"):
            for vocabulary in (50257, 151936):
                yield rows(op, dtype, 64, vocabulary)
        for op in ("token_logp", "sequence_policy_loss", "cross_entropy", "categorical_kl"):
            yield rows(op, dtype, 64, 50257)
        yield rows("fisher_vector_product", dtype, 64, 50257, "forward")
    for op in HEAD_OPS:
        yield head(op, "float32", 512, 896, 32000, masked=0.25)
    for sequences, length in ((8, 512), (256, 4096), (1, 32768)):
        yield scan("gae", sequences, length)
    yield Case("grpo_step", BOTH, "float32", V=32000, H=128, B=8, T=64)


def gpu() -> Iterator[Case]:
    """What people train with: these take a data-centre GPU."""
    for vocabulary in VOCABULARIES:
        for direction in DIRECTIONS:
            yield rows("token_logprob", "bfloat16", 8192, vocabulary, direction)
        yield rows("policy_loss", "bfloat16", 8192, vocabulary)
    for op in ("token_logprob", "policy_loss"):
        yield rows(op, "float32", 8192, 151936)
    for op in ("token_logp", "sequence_policy_loss", "cross_entropy", "categorical_kl"):
        yield rows(op, "bfloat16", 8192, 151936)
    # few rows, and next to none, where the time is the launch's
    yield rows("token_logp", "bfloat16", 16, 151936, "forward")
    yield rows("token_logprob", "bfloat16", 8, 1024, "forward")
    yield rows("policy_loss", "bfloat16", 8, 1024)
    yield rows("fisher_vector_product", "bfloat16", 8192, 151936, "forward")
    for hidden, vocabulary in ((896, 151936), (2048, 128256), (4096, 128256)):
        for op in HEAD_OPS:
            yield head(op, "bfloat16", 8192, hidden, vocabulary, masked=0.25)
    for sequences, length in ((8, 512), (256, 4096), (64, 32768), (1, 1 << 20)):
        yield scan("gae", sequences, length)
    yield Case("grpo_step", BOTH, "bfloat16", V=151936, H=896, B=16, T=1024)


def scaling() -> Iterator[Case]:
    """Curves in N at one vocabulary, and in V at one number of tokens."""
    for tokens in (1024, 4096, 16384, 65536):
        yield rows("policy_loss", "bfloat16", tokens, 32000)
    for tokens in (1024, 4096, 16384):
        yield head("linear_policy_loss", "bfloat16", tokens, 2048, 128256)
    for vocabulary in VOCABULARIES[1:]:
        yield rows("policy_loss", "bfloat16", 4096, vocabulary)


def large() -> Iterator[Case]:
    """Beyond 2^31 logits, beyond 65,535 rows, and rows of a million: right, however fast."""
    yield rows("token_logprob", "bfloat16", 16384, 151936)
    yield rows("policy_loss", "bfloat16", 65544, 50257)
    yield rows("categorical_kl", "bfloat16", 16384, 151936)
    yield rows("fisher_vector_product", "bfloat16", 16384, 151936, "forward")
    yield rows("policy_loss", "float32", 131080, 1031)
    yield scan("gae", 1, 1 << 20)
    yield scan("gae", 131072, 256)


def cpu_scaling() -> Iterator[Case]:
    """The same curves for one core."""
    for tokens in (16, 32, 64, 128, 256):
        yield rows("token_logprob", "float32", tokens, 32000)
    for vocabulary in VOCABULARIES[1:]:
        yield rows("token_logprob", "float32", 32, vocabulary)


SETS = {"check": check, "cpu": cpu, "gpu": gpu, "large": large, "scaling": scaling}
SETS["cpu-scaling"] = cpu_scaling


def select(names: Sequence[str], device: str = "cpu") -> list[Case]:
    """The cases of the named sets, or those whose key is or starts with a name; each once.

    Args:
        device: "cpu" or "gpu": of an operation's cases those of this set are meant, where the set
            has some.

    Raises UserError where a name is neither a set nor the start of a case's key.
    """
    every = list(dict.fromkeys(case for cases in SETS.values() for case in cases()))
    chosen: dict[Case, None] = {}
    for name in names:
        found = list(SETS[name]()) if name in SETS else _matching(name, every)
        if name in {case.op for case in every}:
            own = [case for case in SETS[device]() if case.op == name]
            found = own or [case for case in found if case.op == name]
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _matching(name: str, every: list[Case]) -> list[Case]:
    if name.count("/") == 3 and "=" in name:
        return [Case.parse(name)]
    found = [case for case in every if case.key.startswith(name)]
    if not found:
        raise unknown_name("case", name, [*SETS, *dict.fromkeys(case.op for case in every)])
    return found
