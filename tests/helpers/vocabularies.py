"""Small tokenizers and chat templates in the shapes that language models have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
TURNS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
CORPUS = [
    "x = 1 and y = 12 so x + y = 13",
    "Ben has 9 pears, gets 8 more and finds 8. How many pears?",
    "9+8=17\n17+8=25\n\nThe answer is 25",
    "[INST] user [/INST] assistant system model",
]

# {name: (template, the token that ends an assistant's turn)}
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        EOS,
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        EOS,
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what is known of it without asking it."""

    tokenizer: Any
    spell: Callable[[list[int]], str]  # the text that tokens stand for, each as it is
    dummy: str  # what the tokenizer writes before a text
    has_bos: bool
    keeps_blanks: bool = True

    def with_template(self, name: str) -> Any:
        self.tokenizer.chat_template = TEMPLATES[name][0]
        return self.tokenizer

    def same_text(self, one: str, other: str) -> bool:
        if self.keeps_blanks:
            return one == other
        return "".join(one.split()) == "".join(other.split())


def vocabulary(name: str) -> Vocabulary:
    """One of `VOCABULARIES`, each time a new one."""
    backend, kind, dummy, ends = VOCABULARIES[name]
    tokenizer = Tokenizer.from_str(_trained(backend))
    tokenizer.post_processor = _post_processor(tokenizer, ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
    )
    spellings = {"bytes": _spell_bytes, "blanks": _spell_blanks, "words": _spell_words}
    spell = functools.partial(spellings[kind], fast)
    return Vocabulary(fast, spell, dummy, "bos" in ends, kind != "words")


@functools.cache
def _trained(name: str) -> str:
    """The tokenizer's JSON: `BACKENDS` says its parts."""
    model, trainer, parts = BACKENDS[name]
    tokenizer = Tokenizer(model())
    for part, value in parts.items():
        setattr(tokenizer, part, value)
    specials = [UNK, BOS, EOS]
    tokenizer.train_from_iterator(CORPUS, trainer(special_tokens=specials, show_progress=False))
    if name == "legacy":
        # words for training alone, as sentencepiece has them
        for part, value in (LEGACY | {"pre_tokenizer": None}).items():
            setattr(tokenizer, part, value)
    # as in Phi-3, where its turns swallow the line break behind them
    strips = {"<|user|>", "<|assistant|>", "<|end|>"} if name == "legacy" else set()
    turns = [AddedToken(turn, special=True, rstrip=turn in strips) for turn in TURNS]
    tokenizer.add_special_tokens(turns)
    return tokenizer.to_str()


def _post_processor(tokenizer: Tokenizer, ends: tuple[str, ...]) -> Any:
    opening = f"{BOS} " if "bos" in ends else ""
    closing = f" {EOS}" if "eos" in ends else ""
    known = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    return processors.TemplateProcessing(single=f"{opening}$A{closing}", special_tokens=known)


def _bpe(**options: Any) -> Callable[[], Any]:
    return lambda: models.BPE(unk_token=UNK, **options)


def _bpe_trainer(**options: Any) -> Any:
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    return trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, **options)


def _byte_trainer(**options: Any) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, **options)


def _unigram_trainer(**options: Any) -> Any:
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    return trainers.UnigramTrainer(
        vocab_size=200, unk_token=UNK, initial_alphabet=alphabet, **options
    )


def _metaspace(scheme: str) -> dict[str, Any]:
    return {
        "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme=scheme),
        "decoder": decoders.Metaspace(prepend_scheme=scheme),
    }


def _bytes(add_prefix_space: bool) -> dict[str, Any]:
    return {
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space),
        "decoder": decoders.ByteLevel(),
    }


LEGACY = {
    "normalizer": normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
    ),
    "decoder": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
}
STRIPPED = {
    "normalizer": normalizers.Strip(left=True, right=False),
    **_metaspace("always"),
}

BACKENDS = {
    "bytes": (_bpe(), _byte_trainer, _bytes(False)),
    "spaced bytes": (_bpe(), _byte_trainer, _bytes(True)),
    "always": (_bpe(), _bpe_trainer, _metaspace("always")),
    "first": (_bpe(), _bpe_trainer, _metaspace("first")),
    "never": (_bpe(), _bpe_trainer, _metaspace("never")),
    "legacy": (_bpe(), _bpe_trainer, _metaspace("always")),
    "unigram": (models.Unigram, _unigram_trainer, _metaspace("always")),
    "stripped": (models.Unigram, _unigram_trainer, STRIPPED),
    "words": (
        lambda: models.WordLevel(unk_token=UNK),
        trainers.WordLevelTrainer,
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
    ),
}
# {name: (backend, how its tokens are spelled, what it writes before a text, what it adds)}
VOCABULARIES = {
    "bytes": ("bytes", "bytes", "", ()),
    "bytes, bos": ("bytes", "bytes", "", ("bos",)),
    "bytes, eos": ("bytes", "bytes", "", ("eos",)),
    "spaced bytes, bos and eos": ("spaced bytes", "bytes", " ", ("bos", "eos")),
    "metaspace always, bos": ("always", "blanks", " ", ("bos",)),
    "metaspace first, bos": ("first", "blanks", " ", ("bos",)),
    "metaspace first": ("first", "blanks", " ", ()),
    "metaspace never, bos and eos": ("never", "blanks", "", ("bos", "eos")),
    "legacy, bos": ("legacy", "blanks", " ", ("bos",)),
    "unigram, eos": ("unigram", "blanks", " ", ("eos",)),
    "stripped unigram": ("stripped", "blanks", " ", ()),
    "words, bos": ("words", "words", "", ("bos",)),
}


def _spell_bytes(tokenizer: Any, ids: list[int]) -> str:
    # GPT-2 writes printable bytes as themselves, the others as the characters from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + place): byte for place, byte in enumerate(others)}
    written = [
        piece.encode() if piece in {UNK, BOS, EOS, *TURNS} else bytes(table[c] for c in piece)
        for piece in tokenizer.convert_ids_to_tokens(ids)
    ]
    return b"".join(written).decode()


def _spell_blanks(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")


def _spell_words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))
