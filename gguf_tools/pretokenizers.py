r"""The named ways to cut text into words before byte-level BPE (`tokenizer.ggml.pre`).

A split is a list of regular expressions applied one after the other: each cuts every piece left by
the one before into its matches and what lies between them. The patterns are those of the models'
own tokenizer.json where they are known; llama.cpp's adaptations to C++ (no `\p{Lu}`, no `(?i:`)
agree on nearly all text. The names, and what else they imply, are llama.cpp's: a file with another
name would not load there.
"""

from dataclasses import dataclass

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_TO_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SENTENCE_SIGNS = ".,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}+"


def _words(digits: str, *, start: str = _CONTRACTION + "|", newlines: str = r"[\r\n]*") -> str:
    """The pattern of GPT-4 and its descendants."""
    return (
        rf"{start}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{newlines}|{_SPACES}"
    )


def _cased_words(digits: str, end: str = "") -> str:
    """The pattern of GPT-4o and Tekken: words also end where capitals begin."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{end}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{end}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_DEEPSEEK_WORDS = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)
_SPARK_WORDS = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+|[" + "\r\n" + r"]|\s+(?!\S)|\s+"
)
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_SIGNS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
    "\u2f00-\u2fdf\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
    "\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c"
    "\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _HAN_AND_KANA
)
_JAIS2_SPACES = "|".join([rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)])
_KIMI_LATIN_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_LATIN_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"

SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (DIGIT, GPT2),
    "llama3": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(DIGIT),),
    "qwen35": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "tekken": (_cased_words(DIGIT),),
    "gpt-4o": (_cased_words(r"\p{N}{1,3}", _CONTRACTION + "?"),),
    "tiny_aya": (
        r"\d{1,3}(?=(?:\d{3})*\b)",
        _cased_words(r"\p{N}{1,3}", _CONTRACTION + "?"),
    ),
    "minicpm5": (r"\p{N}{1,3}", _words(DIGITS)),
    "deepseek-llm": (
        "[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SIGNS, r"\s+$", _HAN_TO_HANGUL, DIGITS,
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_TO_HANGUL, DIGIT),
    "deepseek-v3": (r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK_WORDS),
    "spark2_5": (r"\p{N}{1,3}", _HAN_AND_KANA, _SPARK_WORDS, DIGIT),
    "youtu": (_YOUTU_SCRIPTS, _cased_words(DIGIT, _CONTRACTION + "?")),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]"),
    "bloom": (rf" ?[^(\s|{_SENTENCE_SIGNS})]+",),
    "viking": (rf" ?[^(\s|{_SENTENCE_SIGNS})]+", DIGIT),
    "chameleon": (
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )",
        DIGIT, r"[\p{P}!-/:-@\[-`{-~]", GPT2,
    ),
    "superbpe": (DIGITS, r"(?=(\d{3})+(?!\d))"),
    "bailingmoe": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "seed-coder": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
        rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
    ),
    "jais-2": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_JAIS2_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}",
    ),
    "ufakzeka": (_words(DIGIT, start=""),),
    "afmoe": (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_SCRIPTS, _DEEPSEEK_WORDS),
    "laguna": (r"[^\n]+|[\n]+", _words(DIGIT)),
    "exaone-moe": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "granite-embed-multi-97m": (_cased_words(r"\p{N}{1,3}", _CONTRACTION + "?"),),
    "kimi-k2": (
        rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_LATIN_UPPER}*{_KIMI_LATIN_LOWER}+{_CONTRACTION}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_LATIN_UPPER}+{_KIMI_LATIN_LOWER}*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "newlines": (r"[^\n]+|[\n]+",),
    "words": (r"\S+",),
}  # fmt: skip


@dataclass(frozen=True)
class PreTokenizer:
    """What a value of `tokenizer.ggml.pre` stands for."""

    name: str
    split: str  # key of SPLITS
    ignore_merges: bool = False  # a whole word that is a token is that token, whatever the merges
    add_bos: bool = False  # when the file does not say
    nfc: bool = False  # text is brought to Unicode's composed form first
    raw_bytes: bool = False  # tokens are plain text with `<0x0A>` bytes, not the byte alphabet

    @property
    def patterns(self) -> tuple[str, ...]:
        return SPLITS[self.split]


def _group(split: str, names: str, **flags: bool) -> list[PreTokenizer]:
    return [PreTokenizer(name, split, **flags) for name in names.split()]


# Where several names of a split differ only in name, the first is the one to write.
PRETOKENIZERS: dict[str, PreTokenizer] = {
    pre.name: pre
    for pre in (
        *_group(
            "gpt-2",
            "gpt-2 phi-2 jais trillion granite-docling exaone4 modern-bert mellum a.x-4.0 "
            "gigachat roberta-bpe jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code",
        ),
        *_group("gpt-2", "olmo mpt", nfc=True),
        *_group("smollm", "command-r", nfc=True),
        *_group("smollm", "smollm starcoder refact codeshell exaone minerva-7b mellum2"),
        *_group(
            "llama3",
            "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
            ignore_merges=True,
            add_bos=True,
        ),
        *_group("llama3", "dbrx smaug-bpe chatglm-bpe"),
        *_group("llama3", "glm4 glm5", ignore_merges=True),
        *_group("qwen2", "qwen2 stablelm2 megrez", nfc=True),
        *_group("qwen2", "deepseek-r1-qwen hunyuan solar-open grok-2 kormo f2llmv2"),
        *_group("qwen35", "qwen35"),
        *_group("tekken", "tekken", ignore_merges=True, add_bos=True),
        *_group("gpt-4o", "gpt-4o llama4 kanana2 talkie minimax-m2"),
        *_group("granite-embed-multi-97m", "granite-embed-multi-97m", ignore_merges=True),
        *_group("tiny_aya", "tiny_aya cohere2moe"),
        *_group("minicpm5", "minicpm5", ignore_merges=True),
        *_group("deepseek-llm", "deepseek-llm"),
        *_group("deepseek-coder", "deepseek-coder"),
        *_group("deepseek-v3", "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
        *_group("spark2_5", "spark2_5"),
        *_group("youtu", "youtu", ignore_merges=True),
        *_group("falcon", "falcon"),
        *_group("default", "default"),
        *_group("bloom", "bloom gpt3-finnish poro-chat"),
        *_group("viking", "viking"),
        *_group("chameleon", "chameleon", add_bos=True),
        *_group("superbpe", "superbpe"),
        *_group("bailingmoe", "bailingmoe bailingmoe2 llada-moe"),
        *_group("seed-coder", "seed-coder"),
        *_group("jais-2", "jais-2"),
        *_group("ufakzeka", "ufakzeka"),
        *_group("afmoe", "afmoe"),
        *_group("laguna", "laguna"),
        *_group("exaone-moe", "exaone-moe"),
        *_group("kimi-k2", "kimi-k2"),
        *_group("newlines", "gemma4 granite-embed-multi-311m", raw_bytes=True, add_bos=True),
        *_group("newlines", "sarvam-moe", raw_bytes=True),
        *_group("words", "whitespace", raw_bytes=True),
    )
}
