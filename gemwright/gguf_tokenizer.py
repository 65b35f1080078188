"""The tokenizer inside a GGUF file, rebuilt as a `tokenizers` object from the file's metadata.

Two kinds cover the files this package reads (`tokenizer.ggml.model`):

`gpt2`: byte-level BPE with an explicit merge list. How text is cut before merging is only named
(`tokenizer.ggml.pre`); `PRE_TOKENIZERS` spells the names out, after the regular expressions of llama.cpp's
`src/llama-vocab.cpp`. `smollm` cuts every digit off singly before GPT-2's expression.

`llama`: SentencePiece BPE with a score for each token, `▁` for a space and `<0xNN>` tokens for bytes that nothing else
covers (Gemma's kind). SentencePiece merges the neighbours whose joint token scores highest, so the merge list is: every
split of every normal token into two tokens, best score first.

Token types follow the GGUF specification: control and unknown tokens become special added tokens, user-defined ones
plain added tokens (matched in the raw text, longest first).
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

T = TypeVar("T")

SPACE = "▁"  # SentencePiece's stand-in for a space
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


class GgufError(ValueError):
    """A file that is damaged, incomplete, or of a kind that is not read here."""


def field(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """The value of a metadata key; raises GgufError when it is absent or not of this kind."""
    if key not in metadata:
        raise GgufError(f"missing metadata key {key!r}")
    value = metadata[key]
    if type(value) is not kind:
        raise GgufError(
            f"metadata key {key!r} holds {str(value)[:40]!r}, a {type(value).__name__}, not {kind.__name__}"
        )
    return value


def array(metadata: Mapping[str, Any], key: str, kind: type[T], length: int | None = None) -> list[T]:
    """A metadata array whose items are all of this kind, of this length when one is given; raises GgufError."""
    values = field(metadata, key, list)
    if not all(type(value) is kind for value in values):
        raise GgufError(f"metadata key {key!r} holds items that are not {kind.__name__}")
    if length is not None and len(values) != length:
        raise GgufError(f"metadata key {key!r} holds {len(values)} items for {length} tokens")
    return values


def special_ids(metadata: Mapping[str, Any], size: int, required: Collection[str] = ()) -> dict[str, int]:
    """Ids of the special tokens the file names, by role: "bos", "eos", "eot" (end of turn), "padding", "unknown".

    Raises GgufError for an id outside the vocabulary of `size` tokens and for a required role that is absent.
    """
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "eot", "padding", "unknown"):
        key = f"tokenizer.ggml.{role}_token_id"
        if key in metadata or role in required:
            ids[role] = field(metadata, key, int)
            if not 0 <= ids[role] < size:
                raise GgufError(f"metadata key {key!r} is {ids[role]}, outside the vocabulary of {size} tokens")
    return ids


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text starts with BOS; a file that does not say follows llama.cpp's default for its kind."""
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return _flag(metadata, "add_bos_token", default)


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    key = f"tokenizer.ggml.{name}"
    return field(metadata, key, bool) if key in metadata else default


def rebuild(metadata: Mapping[str, Any]) -> Tokenizer:
    """The file's tokenizer, BOS and EOS added where the file asks for them.

    Raises GgufError for a kind of tokenizer that is not read here, and for missing or inconsistent metadata.
    """
    tokens = array(metadata, "tokenizer.ggml.tokens", str)
    types = array(metadata, "tokenizer.ggml.token_type", int, len(tokens))
    # llama.cpp's converter already writes user-defined tokens with plain spaces; other writers keep SentencePiece's.
    texts = [
        t.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)
    ]
    vocab = {text: index for index, text in enumerate(texts)}
    if len(vocab) != len(texts):
        raise GgufError(f"metadata key 'tokenizer.ggml.tokens' repeats {len(texts) - len(vocab)} of its tokens")
    model = field(metadata, "tokenizer.ggml.model", str)
    if model == "gpt2":
        tokenizer = _byte_level(metadata, vocab)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, vocab, types)
    else:
        raise GgufError(f"tokenizer.ggml.model is {model!r}; 'gpt2' and 'llama' are read")
    added = [(AddedToken(text, normalized=False), kind) for text, kind in zip(texts, types, strict=True)]
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens([token for token, kind in added if kind in special])
    tokenizer.add_tokens([token for token, kind in added if kind == TokenType.USER_DEFINED])
    ends = {"bos": adds_bos(metadata), "eos": _flag(metadata, "add_eos_token", False)}
    wanted = [role for role, add in ends.items() if add]
    ids = special_ids(metadata, len(texts), wanted)
    if wanted:
        pieces = [
            texts[ids[role]] if role in ends else role for role in ("bos", "$A", "eos") if role in [*wanted, "$A"]
        ]
        named = [(texts[ids[role]], ids[role]) for role in wanted]
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=named)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]) -> Tokenizer:
    pre = field(metadata, "tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        raise GgufError(f"tokenizer.ggml.pre is {pre!r}; {', '.join(map(repr, PRE_TOKENIZERS))} are read")
    merges: list[tuple[str, str]] = []
    for merge in array(metadata, "tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise GgufError(f"tokenizer.ggml.merges holds {merge!r}, which does not join two tokens to a third")
        merges.append((left, right))
    # Llama 3 takes a word that is a token whole, without its merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> Tokenizer:
    scores = array(metadata, "tokenizer.ggml.scores", float, len(vocab))
    unknown = special_ids(metadata, len(vocab), ["unknown"])["unknown"]
    texts = list(vocab)
    # Only normal tokens arise from merging: bytes, control and user-defined tokens are never spelled out of pieces.
    normal = [index for index, kind in enumerate(types) if kind == TokenType.NORMAL]
    known = {texts[index] for index in normal}
    merges: list[tuple[str, str]] = []
    for index in sorted(normal, key=lambda i: (-scores[i], i)):
        text = texts[index]
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [(left, right) for left, right in splits if left in known and right in known]
        # Ties within a token in the order of its parts' ids, as in the Hugging Face conversion.
        merges.extend(sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token=texts[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces: normalizers.Normalizer = normalizers.Replace(" ", SPACE)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _flag(metadata, "add_space_prefix", True):  # llama.cpp's default; Gemma's files say False
        spaces = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
