"""Which pre-tokenizer (`tokenizer.ggml.pre`) a byte-level tokenizer.json has.

Its structure says so: the regular expressions of its steps are looked up among the known splits.
llama.cpp knows pre-tokenizers by a hash of what they do to one text, which any added token changes;
here the hash only chooses among names that mean the same split, and a disagreement is a warning.
A structure that is not known takes the split that encodes most of the test texts as it does.
"""

from collections.abc import Mapping
from typing import Any

from gguf_tools.errors import UnsupportedModelError, printable
from gguf_tools.pretokenizers import DIGIT, DIGITS, GPT2, PRETOKENIZERS, SPLITS, PreTokenizer
from gguf_tools.vocab.fingerprints import NAMES
from gguf_tools.vocab.tokenizer_json import NAME, TokenizerJson
from gguf_tools.vocab.trial import NFC, Trial

SMALLEST_AGREEMENT = 0.8  # of the test texts, for the split nearest to an unknown structure

# Structures of tokenizer.json files that are spelled differently from the splits they are.
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
OTHER_SPELLINGS: dict[tuple[str, ...], str] = {
    (_PUNCTUATION, GPT2, DIGITS, "[0-9][0-9][0-9]"): "falcon",
    (*SPLITS["deepseek-llm"][:-1], DIGIT): "deepseek-llm",
    (SPLITS["llama3"][0].replace(r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"),): "llama3",
}


def splits_to_try(source: TokenizerJson) -> list[str]:
    """What `find_pre` wants to know of, as a trial names splits."""
    return sorted({p.split + end for p in _fitting(source) for end in ("", NFC)})


def find_pre(source: TokenizerJson, trial: Trial | None, *, tried: bool) -> tuple[str, list[str]]:
    """The name to write, and warnings; `tried` tells whether a trial was begun."""
    split = known_split(source.pre_tokenizer)
    fitting = _fitting(source)
    if split is None:
        return _nearest(source, trial)
    exact = [p for p in fitting if p.ignore_merges == source.ignore_merges]
    if trial is None:
        chosen = (exact or fitting)[0]
        late = f"{NAME}: trying it out took too long; its pre-tokenizer looks like '{chosen.name}'"
        return chosen.name, [late] if tried else []
    by_hash = PRETOKENIZERS.get(NAMES.get(trial.fingerprint, ""))
    warnings = []
    if by_hash in (exact or fitting):
        chosen = by_hash
    else:
        ranked = sorted(exact or fitting, key=lambda p: p.nfc != uses_nfc(source))
        chosen = ranked[0]
        if by_hash is not None:
            warnings.append(
                f"{NAME}: its pre-tokenizer is that of '{chosen.name}', but llama.cpp's hash says "
                f"'{by_hash.name}'; '{chosen.name}' is written"
            )
    if chosen.ignore_merges != source.ignore_merges and trial.merges_matter:
        warnings.append(
            f"{NAME}: '{chosen.name}' treats whole words otherwise than this tokenizer: "
            f"{trial.merges_matter} of {trial.n_texts} test texts encode differently"
        )
    warnings += _agreement(source, chosen, trial)
    return chosen.name, warnings


def _fitting(source: TokenizerJson) -> list[PreTokenizer]:
    """Those with the split that is known by its structure, or all."""
    split = known_split(source.pre_tokenizer)
    return [p for p in _byte_level() if p.split == split or split is None]


def known_split(steps: list[dict[str, Any]]) -> str | None:
    """The split that these pre-tokenizer steps are, or None."""
    patterns = []
    for step in steps:
        found = _patterns(step)
        if found is None:
            return None
        patterns += found
    key = tuple(patterns)
    return next((name for name, known in SPLITS.items() if known == key), OTHER_SPELLINGS.get(key))


def uses_nfc(source: TokenizerJson) -> bool:
    """Whether text is brought to Unicode's composed form first."""
    return any(step["type"] == "NFC" for step in source.normalizer)


def _patterns(step: Mapping[str, Any]) -> list[str] | None:
    """A step as regular expressions whose matches are cut out, or None for something else."""
    kind = step["type"]
    if kind == "ByteLevel":
        if step.get("add_prefix_space") is True:
            return None
        return [GPT2] if step.get("use_regex", True) is True else []
    if kind == "Digits":
        return [DIGIT if step.get("individual_digits") is True else DIGITS]
    if kind == "Punctuation":
        return [_PUNCTUATION] if step.get("behavior") == "Contiguous" else None
    if kind == "Split":
        pattern = step.get("pattern")
        text = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        way = (step.get("behavior"), step.get("invert") is True)
        if isinstance(text, str) and way in (("Isolated", False), ("Removed", True)):
            return [text]
    return None


def _nearest(source: TokenizerJson, trial: Trial | None) -> tuple[str, list[str]]:
    kinds = ", ".join(step["type"] for step in source.pre_tokenizer) or "none"
    what = f"{NAME}: an unknown pre-tokenizer ({printable(kinds, 80)})"
    known = ", ".join(sorted(p.name for p in _byte_level()))
    if trial is None:
        raise UnsupportedModelError(
            f"{what} that cannot be run to find its like; known are {known}"
        )
    by_hash = PRETOKENIZERS.get(NAMES.get(trial.fingerprint, ""))
    if by_hash is not None and not by_hash.raw_bytes:
        chosen = by_hash
    else:
        chosen = max(
            _byte_level(),
            key=lambda p: (
                trial.same_ids[_key(p)],
                trial.same_words[_key(p)],
                p.ignore_merges == source.ignore_merges,
            ),
        )
    same = trial.same_ids[_key(chosen)]
    if same < SMALLEST_AGREEMENT * trial.n_texts:
        raise UnsupportedModelError(
            f"{what}; the nearest known, '{chosen.name}', encodes only {same} of {trial.n_texts} "
            f"test texts identically; known are {known}"
        )
    return chosen.name, [
        f"{what}: '{chosen.name}' is written, with which {same} of {trial.n_texts} test texts "
        "encode identically"
    ]


def _agreement(source: TokenizerJson, chosen: PreTokenizer, trial: Trial) -> list[str]:
    same = trial.same_ids[chosen.split + (NFC if uses_nfc(source) else "")]
    if same == trial.n_texts:
        return []
    return [
        f"{NAME}: {same} of {trial.n_texts} test texts encode identically with the pre-tokenizer "
        f"'{chosen.name}'; what else the file does to text has no form in GGUF"
    ]


def _byte_level() -> list[PreTokenizer]:
    return [p for p in PRETOKENIZERS.values() if not p.raw_bytes]


def _key(pre: PreTokenizer) -> str:
    return pre.split + (NFC if pre.nfc else "")
