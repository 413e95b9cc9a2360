"""A converted folder gives what the file held, by transformers' own classes; a damaged file is refused at once."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.base.gguf import convert_gguf, to_bfloat16
from deltaw.base.gguf_header import check_gguf, open_header
from deltaw.errors import BaseError

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "Ġ 1", "Ġ Ġ"]
BYTES = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 173)]
BYTES += [chr(c) for c in range(174, 256)] + [chr(256 + n) for n in range(68)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES), "<tool>", "[PAD]"]
TYPES = [3] * 3 + [1] * (len(BYTES) + len(MERGES)) + [4, 5]
VOCAB = len(TOKENS) + 1  # the embedding may have more rows than there are tokens
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def oracle_model(arch, tied=True, **more):
    """A transformers model with random weights, as the original from which somebody made the GGUF file."""
    from transformers import AutoConfig

    torch.manual_seed(7)
    config = AutoConfig.for_model(
        arch, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=128,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters=more.pop("rope", {"rope_type": "default", "rope_theta": 5000.0}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def gguf_name(name):
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top or name == "lm_head.weight":
        return top.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    stem, _, ending = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[stem]}.{ending}"


def permute(weight, num_heads):
    """As llama.cpp's convert_hf_to_gguf.py does for the llama architecture."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, 2, rows // num_heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stored_as(name, values):
    if values.ndim == 1:
        return Quant.F32
    return Quant.F16 if "attn_" in name else Quant.Q8_0


def write_gguf(path, model, arch, *, pre="smollm", tied=True, extra=None, change=None):
    """The file, and the state dict that a reader must find in it (after the loss of the storage types)."""
    writer, expected = gguf.GGUFWriter(path, arch), {}
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for add in change or ():
        add(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        new_name, values = gguf_name(name), tensor.numpy()
        quant = stored_as(new_name, values)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permute(values, HEADS if "q_proj" in name else KV_HEADS)
            kept = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), quant), quant)
        else:
            kept = gguf.quants.dequantize(gguf.quants.quantize(values, quant), quant)
        expected[name] = torch.from_numpy(np.array(kept)).bfloat16()
        writer.add_tensor(new_name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, oracle_model("llama"), "llama")
    return path


@pytest.fixture(scope="module")
def llama_folder(llama_file):
    convert_gguf(llama_file, llama_file.parent / "converted")
    return llama_file.parent / "converted"


# ── Weights and config ──


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_converted_folder_gives_the_logits_of_the_original_model(tmp_path, arch, tied):
    original = oracle_model(arch, tied)
    expected = write_gguf(tmp_path / "a.gguf", original, arch, tied=tied)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    original.load_state_dict({name: tensor.float() for name, tensor in expected.items()}, strict=not tied)
    original.tie_weights()
    tokens = torch.arange(40)[None] * 7 % VOCAB
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, original(tokens).logits)
    assert loaded.config.tie_word_embeddings is tied
    for key in ("head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "eos_token_id"):
        assert getattr(loaded.config, key, None) == pytest.approx(getattr(original.config, key, None)), key
    assert type(loaded) is type(original)


def test_weights_are_bfloat16_bit_for_bit_when_chunks_are_small(tmp_path, llama_file, llama_folder, monkeypatch):
    monkeypatch.setattr("deltaw.base.gguf.CHUNK_ELEMENTS", 1500)
    convert_gguf(llama_file, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (llama_folder / "model.safetensors").read_bytes()


def test_rounding_to_bfloat16_matches_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    edges = [0, 0x80000000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1, 0x00008000]
    values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)


def test_nan_stays_a_quiet_nan():
    raw = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    rounded = torch.from_numpy(to_bfloat16(raw).view(np.int16)).view(torch.bfloat16)
    assert torch.isnan(rounded).all() and (to_bfloat16(raw) & 0x40).all()


def test_llama3_rope_factors_become_the_config_that_gives_them(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    model = oracle_model("llama", rope=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 5000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    write_gguf(tmp_path / "a.gguf", model, "llama", extra={"rope_freqs.weight": (plain / scaled).numpy()})
    convert_gguf(tmp_path / "a.gguf", tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["rope_parameters"] == pytest.approx(rope)


# ── Tokenizer ──


def test_folder_opens_with_autotokenizer_and_renders_its_template(llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    text = "hello  hello 12\n<tool>héllo 日本 🙂<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    words = tokenizer.convert_ids_to_tokens(tokenizer(" hello 12<tool>")["input_ids"])
    assert words == ["Ġhello", "Ġ", "1", "2", "<tool>"]  # digits stand alone: neither "Ġ1" nor "12"
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.model_max_length) == (2, 0, 128)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n"
    assert "[PAD]" not in tokenizer.get_vocab()  # unused entries are no text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_word_splitting_is_that_of_transformers(tmp_path, llama_file, pre):
    published = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    write_gguf(tmp_path / "a.gguf", oracle_model("llama"), "llama", pre=pre)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "model")
    steps = json.loads((tmp_path / "model/tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    regexes = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    expected = published.GGUF_PRE_TOKENIZER_SPLITS.get(pre)
    assert regexes == ([expected] if expected else [])
    assert steps[-1]["type"] == "ByteLevel" and steps[-1]["use_regex"] is (expected is None)


@pytest.mark.parametrize(("says", "first"), [(True, 1), (False, None), (None, 1)])
def test_bos_is_added_when_the_file_or_the_family_says_so(tmp_path, says, first):
    change = [] if says is None else [lambda writer: writer.add_add_bos_token(says)]
    write_gguf(tmp_path / "a.gguf", oracle_model("llama"), "llama", pre="llama-bpe", change=change)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("hello")["input_ids"]
    hello = TOKENS.index("hello")
    assert ids == ([first, hello] if first else [hello])


# ── Refusals ──


def refusal(path, action=check_gguf):
    """The message of the BaseError, which must come within a second and without large allocations."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(BaseError) as caught:
            action(path)
        seconds, peak_bytes = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 1 and peak_bytes < 50e6
    return str(caught.value)


def test_a_file_cut_anywhere_is_refused(llama_file, tmp_path):
    whole = llama_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in np.linspace(0, len(whole) - 1, 50).astype(int):
        cut.write_bytes(whole[:size])
        assert str(cut) in refusal(cut)


KV_COUNT, FIRST_KEY_LENGTH, HUGE = 16, 24, struct.pack("<Q", 2**60)
TOKEN_ARRAY, TYPE_ARRAY, EMBEDDING = b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type", b"token_embd.weight"
LIES = {  # what is wrong: (after which bytes, how far behind them, what stands there instead, what must be named)
    "magic": (b"", 0, b"GGML", "GGUF"),
    "version": (b"", 4, struct.pack("<I", 9), "version"),
    "big endian": (b"", 4, struct.pack(">I", 3), "big-endian"),
    "tensor count": (b"", 8, HUGE, "number of tensors"),
    "tensor count that could just fit": (b"", 8, struct.pack("<Q", 60000), "number of tensors"),
    "key count": (b"", KV_COUNT, HUGE, "number of keys"),
    "key length": (b"", FIRST_KEY_LENGTH, HUGE, "metadata key"),
    "value type": (b"general.architecture", 0, struct.pack("<I", 77), "77"),
    "string length": (b"general.architecture", 4, HUGE, "general.architecture"),
    "string array count": (TOKEN_ARRAY, 8, HUGE, "tokenizer.ggml.tokens"),
    "string array item length": (TOKEN_ARRAY, 16, HUGE, "string 0"),
    "number array count": (TYPE_ARRAY, 8, HUGE, "tokenizer.ggml.token_type"),
    "nested array": (TYPE_ARRAY, 4, struct.pack("<I", 9), "item type 9"),
    "dimension count": (EMBEDDING, 0, struct.pack("<I", 2**31), "dimensions"),
    "huge dimension": (EMBEDDING, 12, HUGE, "past the end"),
    "overflowing dimensions": (EMBEDDING, 4, HUGE + HUGE, "past the end"),
    "no dimension": (EMBEDDING, 4, struct.pack("<Q", 0), "blocks"),
    "tensor type": (EMBEDDING, 20, struct.pack("<I", 99), "type 99"),
    "offset beyond the end": (EMBEDDING, 24, HUGE, "past the end"),
    "offset unaligned": (EMBEDDING, 24, struct.pack("<Q", 1), "unaligned"),
    "offset shared with the next": (EMBEDDING, 24, struct.pack("<Q", 64), "overlapping"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(llama_file, tmp_path, lie):
    after, distance, replacement, named = LIES[lie]
    data = bytearray(llama_file.read_bytes())
    position = data.index(after) + len(after) + distance
    data[position : position + len(replacement)] = replacement
    (tmp_path / "lie.gguf").write_bytes(data)
    assert named in refusal(tmp_path / "lie.gguf")


def test_random_damage_to_the_header_never_raises_anything_else(llama_file, tmp_path):
    whole = llama_file.read_bytes()
    header_bytes = whole.index(b"output_norm.weight")
    generator = np.random.default_rng(3)
    for trial in range(120):
        data = bytearray(whole)
        data[generator.integers(header_bytes)] ^= 1 << generator.integers(8)
        (tmp_path / "flip.gguf").write_bytes(data)
        try:
            convert_gguf(tmp_path / "flip.gguf", tmp_path / f"model-{trial}")
        except BaseError:
            assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda writer: writer.add_sliding_window(64), "sliding_window"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "yarn"),
        (lambda writer: writer.add_rope_dimension_count(8), "rotary size 8"),
        (lambda writer: writer.add_expert_count(8), "expert_count"),
        (lambda writer: writer.add_uint16("split.count", 3), "llama-gguf-split"),
    ],
)
def test_what_the_folder_cannot_express_is_refused_by_name(tmp_path, change, named):
    write_gguf(tmp_path / "a.gguf", oracle_model("llama"), "llama", change=[change])
    assert named in refusal(tmp_path / "a.gguf", lambda path: convert_gguf(path, tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_unknown_architecture_pre_tokenizer_and_tensor_are_refused(tmp_path):
    def message(**how):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        write_gguf(path, oracle_model("llama"), **{"arch": "llama"} | how)
        return refusal(path, lambda path: convert_gguf(path, tmp_path / "model"))

    assert "llama, qwen2, qwen3" in message(arch="gemma3")
    assert "transformers first" in message(pre="tekken")
    assert "blk.0.attn_sinks.weight is unknown" in message(extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    assert "attn_q.bias is missing" in message(arch="qwen2")
    assert "I8" in message(extra={"blk.0.strange": np.ones(32, np.int8)})


def test_an_existing_folder_and_a_missing_file_are_refused(llama_file, llama_folder, tmp_path):
    with pytest.raises(BaseError, match="exists already"):
        convert_gguf(llama_file, llama_folder)
    with pytest.raises(BaseError, match="cannot be opened"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "model")


# ── The walk itself ──


def test_the_walk_reads_what_ggufreader_reads(llama_file):
    reader = gguf.GGUFReader(llama_file)
    with open_header(Path(llama_file)) as header:
        assert set(header.values) == {key for key in reader.fields if not key.startswith("GGUF.")}
        for key, value in header.values.items():
            if isinstance(value, int | float | str):
                assert value == reader.fields[key].contents(), key
        assert set(header.tensors) == {tensor.name for tensor in reader.tensors}
        for tensor in reader.tensors:
            found = header.tensors[tensor.name]
            assert (found.start, found.num_bytes, found.quant) == (
                tensor.data_offset,
                tensor.n_bytes,
                tensor.tensor_type,
            )
            assert found.shape == tuple(reversed(tensor.shape.tolist()))


def test_checking_half_a_million_strings_takes_little_time_and_memory(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["word"])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    one = struct.pack("<Q", 1) + struct.pack("<Q", 4) + b"word"
    many = struct.pack("<Q", 500_000) + (struct.pack("<Q", 4) + b"word") * 500_000
    data = (tmp_path / "a.gguf").read_bytes()
    assert data.count(one) == 1
    (tmp_path / "a.gguf").write_bytes(data.replace(one, many) + bytes(64))
    start = time.perf_counter()
    check_gguf(tmp_path / "a.gguf")
    assert time.perf_counter() - start < 1
