"""Trains the tiny world's Llama tokenizer on the generator's own text and the vicuna_v1 prompt.

Words are learned by byte-pair encoding with byte fallback, as in Llama. Frequent phrases, the system prompt among
them, are then joined word by word into one piece each, which keeps prompts short. No piece crosses the boundary between
a role mark and what follows, so that masking by role works as with the large models.
"""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from playground.tiny.questions import KINDS, ask, caption, text_turn
from playground.tiny.scenes import PlacedDigit

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PHRASES = (
    SYSTEM_PROMPT,
    "USER:",
    "ASSISTANT:",
    "Is there a",
    "Is there an",
    "How many",
    "digits are there?",
    "Which digit is",
    "in the",
    "image?",
    "top left?",
    "top right?",
    "bottom left?",
    "bottom right?",
    "leftmost?",
    "rightmost?",
    "topmost?",
    "bottommost?",
    "next",
    "left of the",
    "right of the",
    "above the",
    "below the",
    "larger,",
    "Read the digits",
    "from left to right.",
    "Sort the digits",
    "What comes after",
    "There are",
    "digits:",
    "A.",
    "B.",
    "C.",
    "D.",
)
EXTRA_TEXT = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Describe the image. What is in the picture? Please say what you see in this photograph.",
)
SPECIAL = ("<unk>", "<s>", "</s>")
MARK = "▁"


def corpus(samples: int = 400) -> list[str]:
    """Text of the generator, each question both at the start of a line and after a role mark."""
    rng = np.random.default_rng(0)
    lines = [*PHRASES, *EXTRA_TEXT]
    for _ in range(samples):
        values = rng.permutation(10)[: rng.integers(2, 6)]
        digits = tuple(PlacedDigit(int(v), 0, *rng.uniform(20, 316, 2), 40) for v in values)
        lines.append(caption(digits))
        turns = [turn for kind in KINDS if (turn := ask(kind, digits, rng))] + [text_turn(rng)]
        for question, answer in turns:
            lines += [*question.split("\n"), answer]
    return lines


def _words(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Alphabet and merges of a word-level byte-pair encoding; digits and punctuation stay single."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Split(Regex("▁?[0-9]|[.,:?']"), "isolated")]
    )
    alphabet = [chr(c) for c in range(33, 127)] + [MARK]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    lines = corpus()
    trained.train_from_iterator(lines + [" " + line for line in lines], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return sorted(set(alphabet) | {c for c in model["vocab"] if len(c) == 1}), merges


def _join(pieces: list[str], vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Add the merges that build one piece out of `pieces`, from left to right."""
    whole = pieces[0]
    for piece in pieces[1:]:
        if (whole, piece) not in merges:
            merges.append((whole, piece))
            vocab.setdefault(whole + piece, len(vocab))
        whole += piece


def build_tokenizer(word_vocab: int = 330) -> LlamaTokenizer:
    """The tiny tokenizer: <unk> 0, <s> 1, </s> 2, 256 bytes, characters, words, phrases."""
    alphabet, merges = _words(word_vocab)
    vocab: dict[str, int] = {}
    for token in (*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *alphabet):
        vocab.setdefault(token, len(vocab))
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    for digit in "0123456789":
        if (MARK, digit) not in merges:
            merges.append((MARK, digit))
            vocab.setdefault(MARK + digit, len(vocab))
    for phrase in PHRASES:
        for start in ("", MARK):
            now = LlamaTokenizer(vocab=dict(vocab), merges=list(merges), add_prefix_space=False)
            pieces = now.tokenize(start.replace(MARK, " ") + phrase)
            _join(pieces, vocab, merges)
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, legacy=False, model_max_length=2048, padding_side="right", pad_token="<unk>"
    )
    return tokenizer
