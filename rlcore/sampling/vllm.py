"""Completions from vLLM servers: token ids in, token ids and log-probabilities out, over HTTP.

New weights go by a directory that the servers can read, under a version that each completion names
in turn: a server that was started again, or that another run has given its weights to, is noticed,
and gets the right ones.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlcore.data.encoding import encode_prompts
from rlcore.data.ends import end_tokens
from rlcore.errors import UserError
from rlcore.sampling.rollout import Rollout, as_rollout
from rlcore.sampling.sampler import SamplingOptions
from rlcore.sampling.served_weights import write_served
from rlcore.sampling.server import PASSING, Server

MODELS, VERSION = "/v1/models", "/weight_info"
GENERATE, RPC = "/inference/v1/generate", "/collective_rpc"
NEW_VERSION, FORGET = "/update_weight_version", "/reset_prefix_cache"
HOW_TO_START = "start it with `rlcore serve`, which sets what is needed"
ATTEMPTS = 3  # to have completions from the right weights
# log-probabilities of tokens that cannot have been drawn
LEAST_LOGP = -1e4


@dataclass(frozen=True)
class _Completion:
    ids: list[int]
    logp: list[float]
    versions: frozenset[str]  # of the weights that its tokens come from


def check_servers(urls: Sequence[str], timeout: float, vocabulary: int) -> None:
    """Raise UserError unless every URL is a vLLM server that takes weights and such a vocabulary.

    `vocabulary` is the policy's number of token ids.
    """
    for url in urls:
        server = Server(url, timeout)
        models = server.get(MODELS)
        if not (isinstance(models, dict) and models.get("data")):
            raise UserError(f"{url}{MODELS} names no model: give the URL of a vLLM server")
        try:
            server.get(VERSION)
        except UserError as error:
            raise UserError(
                f"the server at {url} takes no new weights ({error}): {HOW_TO_START}"
            ) from error
        _check_vocabulary(server, vocabulary)


def _check_vocabulary(server: Server, vocabulary: int) -> None:
    """The policy's last token is known there, and the one behind it is not."""
    parameters = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    try:
        server.post(GENERATE, {"token_ids": [vocabulary - 1], "sampling_params": parameters})
    except UserError as error:
        raise UserError(
            f"the server at {server.url} does not know the policy's token {vocabulary - 1} "
            f"({error}): it serves another model; start it with `rlcore serve --model` and the "
            "policy's directory"
        ) from error


class VLLMSampler:
    """A Sampler on one or more servers, which take turns.

    Args:
        urls: http://HOST:PORT of each.
        policy, tokenizer: whose end tokens end a completion; of the policy also the device.
        timeout: seconds to wait for an answer.
        max_requests: prompts in flight at a time, over all servers.
        weights_dir: where weights are put for the servers to read; None: a temporary directory,
            for servers on this machine.
    """

    def __init__(
        self,
        urls: Sequence[str],
        policy: Any,
        tokenizer: Any,
        *,
        timeout: float = 600.0,
        max_requests: int = 64,
        weights_dir: str | None = None,
    ):
        self._closed = threading.Event()
        self.servers = [Server(url.rstrip("/"), timeout, self._closed.is_set) for url in urls]
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_requests = max_requests
        self.resampled = 0  # completions of the last call that came from other weights at first
        self._parent = weights_dir
        self._place: Path | None = None
        self._is_own = False  # this sampler has made it
        self._run = uuid.uuid4().hex[:8]
        self.step: int | None = None  # of the policy that the servers have

    @property
    def version(self) -> str:
        """What the servers call the policy's weights; of this run alone."""
        return f"{self._run}-{self.step}"

    def share(self) -> tuple[str, str | None]:
        """What other processes' samplers need to expect the weights that this one brings."""
        return self._run, str(self._place) if self._place else None

    def follow(self, shared: tuple[str, str | None], step: int) -> None:
        """Expect the weights that the sampler of another process has brought."""
        self._run, place = shared
        self._place, self.step = Path(place) if place else None, step

    def sync(self, policy: Any, step: int, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Bring the policy to every server, unless it is there.

        Raises:
            UserError: a server that does not take it, or is gone.
        """
        if step == self.step:
            return
        self.policy = policy
        if self._place is None:
            self._place = Path(tempfile.mkdtemp(prefix="rlcore-weights-", dir=self._parent))
            self._is_own = True
        before, self.step = self.step, step
        write_served(policy, None, self._weights(step), weights)
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(self._bring, self.servers))
        if before is not None:
            shutil.rmtree(self._weights(before), ignore_errors=True)

    def _weights(self, step: int | None) -> Path:
        return self._place / f"step-{step}"

    def _bring(self, server: Server) -> None:
        """Have the server load the present weights, and forget what it made with the old ones."""
        # the version goes first: what comes in between is told from what comes after by none
        server.post(NEW_VERSION, {"new_version": "loading"})
        kwargs = {"weights_path": str(self._weights(self.step).absolute())}
        try:
            # 500 is what weights of another shape are answered with
            busy = set(PASSING) - {500}
            server.post(RPC, {"method": "reload_weights", "kwargs": kwargs}, busy)
        except UserError as error:
            raise UserError(
                f"the server at {server.url} could not load the policy's weights ({error}): does "
                f"it serve this model, and can it read {kwargs['weights_path']}? {HOW_TO_START}"
            ) from error
        server.post(FORGET, {})
        server.post(NEW_VERSION, {"new_version": self.version})

    def sample(
        self,
        prompts: Sequence[str | list[dict] | list[int]],
        options: SamplingOptions,
        seed: int = 0,
    ) -> Rollout:
        """Completions of each prompt, sampled from the policy that was synced last.

        Raises:
            UserError: a prompt that is refused, a server that is gone, or other weights again and
                again.
        """
        encoded = encode_prompts(self.tokenizer, prompts, options.max_prompt_length)
        eos = end_tokens(self.policy, self.tokenizer)
        numbers = random.Random(seed)
        bodies = [_request(ids, options, eos.tolist(), numbers.getrandbits(62)) for ids in encoded]
        self.resampled = 0
        found: list[list[_Completion]] = [[] for _ in bodies]
        for number, completions in self._answers(bodies):
            # greedy ones are asked for once, being all the same
            found[number] = completions * (options.num_generations // len(completions))
        device = next(self.policy.parameters()).device
        rows = [completion for group in found for completion in group]
        ids = _padded([row.ids for row in rows], torch.int64).to(device)
        logp = _padded([row.logp for row in rows], torch.float32).to(device)
        if bool(logp.isnan().any()):
            raise FloatingPointError("the sampler's log-probabilities are NaN")
        return as_rollout(self.tokenizer, prompts, encoded, ids, logp, eos.to(device))

    def _answers(self, bodies: Sequence[dict]) -> Iterator[tuple[int, list[_Completion]]]:
        """(number of the request, its completions) as they are done."""
        workers = max(1, min(self.max_requests, len(bodies)))
        pool = ThreadPoolExecutor(workers)
        try:
            futures: dict[Future, int] = {
                pool.submit(self._answer, number, body): number
                for number, body in enumerate(bodies)
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, number: int, body: dict) -> list[_Completion]:
        server = self.servers[number % len(self.servers)]
        for _ in range(ATTEMPTS):
            completions = _completions(server, body)
            if all(each.versions <= {self.version} for each in completions):
                return completions
            self._renew(server, len(completions))
        raise UserError(
            f"the server at {server.url} sampled from other weights than this run's, {ATTEMPTS} "
            "times: give each run servers of its own"
        )

    _renewing = threading.Lock()

    def _renew(self, server: Server, count: int) -> None:
        """Bring the weights again, to a server that was started again, once for all requests."""
        with self._renewing:
            self.resampled += count
            if server.get(VERSION)["weight_version"] != self.version:
                self._bring(server)

    def close(self) -> None:
        """End waiting for servers; remove the weights' directory."""
        self._closed.set()
        if self._is_own:
            shutil.rmtree(self._place, ignore_errors=True)


def _request(
    ids: list[int], options: SamplingOptions, ends: list[int], seed: int
) -> dict[str, Any]:
    """A prompt's request; every parameter is given, so that none of the server's defaults count."""
    parameters = {
        "n": 1 if options.greedy else options.num_generations,
        "temperature": 0.0 if options.greedy else options.temperature,
        "top_p": 1.0 if options.greedy else options.top_p,
        "top_k": 0 if options.greedy else options.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": options.max_new_tokens,
        "min_tokens": 0,
        "seed": seed,
        "stop_token_ids": ends,
        # of the server's own idea of an end; the ends above are the policy's
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    return {"token_ids": ids, "sampling_params": parameters}


def _completions(server: Server, body: dict[str, Any]) -> list[_Completion]:
    answer = server.post(GENERATE, body)
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = [_completion(choice) for choice in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{server.url}{GENERATE} gives no token ids with log-probabilities and versions of "
            f"weights ({error!r:.100}): vLLM 0.32 does"
        ) from error
    wanted = body["sampling_params"]["n"]
    if len(completions) != wanted or not all(each.ids for each in completions):
        raise UserError(
            f"{server.url}{GENERATE} gave {len(completions)} completions, some maybe empty, where "
            f"{wanted} were asked for"
        )
    return completions


def _completion(choice: dict[str, Any]) -> _Completion:
    ids = choice["token_ids"]
    tokens = choice["logprobs"]["content"]
    if [token["token_id"] for token in tokens] != ids:
        raise ValueError("log-probabilities of other tokens")
    versions = frozenset(span["version"] for span in choice["weight_versions"])
    logp = [max(float(token["logprob"]), LEAST_LOGP) for token in tokens]
    return _Completion(ids, logp, versions)


def _padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> torch.Tensor:
    """(N, C), zeros behind each row."""
    table = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=dtype)
    return table
