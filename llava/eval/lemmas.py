"""Base forms of English words by suffix rules, for comparing one-word answers without a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

# Forms that no rule reaches, and that answers about videos use.
_IRREGULAR = {
    "ate": "eat",
    "children": "child",
    "drank": "drink",
    "drawn": "draw",
    "drew": "draw",
    "driven": "drive",
    "drove": "drive",
    "eaten": "eat",
    "feet": "foot",
    "fell": "fall",
    "flew": "fly",
    "geese": "goose",
    "gave": "give",
    "held": "hold",
    "lying": "lie",
    "made": "make",
    "men": "man",
    "mice": "mouse",
    "people": "person",
    "ran": "run",
    "ridden": "ride",
    "rode": "ride",
    "sang": "sing",
    "sat": "sit",
    "spoke": "speak",
    "stood": "stand",
    "swam": "swim",
    "teeth": "tooth",
    "threw": "throw",
    "took": "take",
    "went": "go",
    "women": "woman",
    "wore": "wear",
    "wrote": "write",
}
_VOWELS = set("aeiouy")


@lru_cache(maxsize=100_000)
def lemmas(word: str) -> frozenset[str]:
    """What a lower-case word may be a form of, itself included.

    A suffix does not tell whether an `e` was dropped (`dancing`, `walking`), so both readings are given.
    """
    found = {word}
    if word in _IRREGULAR:
        return frozenset(found | {_IRREGULAR[word]})
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        found.add(word[:-1])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
        elif word.endswith("es"):
            found.add(word[:-2])
        if word.endswith("ves"):
            found |= {word[:-3] + "f", word[:-3] + "fe"}
    for suffix in ("ing", "ed"):
        stem = word.removesuffix(suffix)
        if stem == word or word.endswith("eed") or not _VOWELS & set(stem):
            continue
        found |= {stem, stem + "e"}
        if len(stem) > 2 and stem[-1] == stem[-2]:
            found.add(stem[:-1])
        if suffix == "ed" and stem.endswith("i"):
            found.add(stem[:-1] + "y")
    return frozenset(found)


def same_words(left: Sequence[str], right: Sequence[str]) -> bool:
    """Are two lists of words the same, word for word, when forms of one word count as equal?"""
    return len(left) == len(right) and all(lemmas(a) & lemmas(b) for a, b in zip(left, right, strict=True))
