"""A model run by the kernels of deltaw against the same model run by its own modules: losses, gradients, refusals."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import SMALL, flat_row, lively_model, own_losses, small_base, some_documents

from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter
from deltaw.base import decoder as running
from deltaw.base import forward, proof, reading
from deltaw.base.decoder import Decoder
from deltaw.base.formed import exchange, linear_layers
from deltaw.base.proof import prove_decoder
from deltaw.base.quant import quantised_reader
from deltaw.data.example import Example
from deltaw.data.pack import flat_batch, shared_batch
from deltaw.engine.objective import batch_loss, head_factors, score_batch
from deltaw.kernels import block, spans_of

FAST = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "granite",
)
LENGTHS = (9, 2, 40, 17, 130, 300)


def proven(kind, dtype=torch.float32):
    model = lively_model(kind).to(dtype).requires_grad_(False)
    assert forward.prove(model) is None
    decoder, reason = prove_decoder(model)
    assert decoder is not None, reason
    return model, decoder


def random_adapter(model, seed=0, **options):
    spec = LoraSpec(**{"rank": 3, "alpha": 6, **options})
    adapter = new_adapter(choose(model, spec), spec, seed)
    generator = torch.Generator().manual_seed(seed)
    return adapter.with_factors({
        name: Factors(f.A, 0.05 * torch.randn(f.B.shape, generator=generator), f.magnitude) for name, f in adapter.factors.items()
    })  # fmt: skip


def gradients(loss, injection):
    named = {f"{part} of {name}": tensor for name, part, tensor in injection.trained()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def packed_loss(model, decoder, documents):
    tokens, positions, bounds = flat_row(documents)
    logits = forward.flat_logits(model, decoder.hidden_states(tokens, positions, spans_of(bounds)))
    losses = F.cross_entropy(logits, tokens.roll(-1), reduction="none")
    return sum(losses[start : stop - 1].sum() for start, stop in pairwise(bounds))


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("step", [1, running.ROW_STEP], ids=["as long as it is", "rounded up"])
def test_loss_and_every_factors_gradient_of_a_packed_row_are_those_of_the_models_own_forward(kind, step, monkeypatch):
    monkeypatch.setattr(running, "row_step", lambda _: step)
    model, decoder = proven(kind)
    documents = some_documents(LENGTHS)
    with inject(model, random_adapter(model), trainable=True) as injection:
        assert decoder.refusal() is None
        ours = packed_loss(model, decoder, documents)
        plain = sum(own_losses(model, document).sum() for document in documents)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
        slopes, wanted = gradients(ours, injection), gradients(plain, injection)
    assert slopes.keys() == wanted.keys() and len(slopes) >= 14
    largest = max(float(slope.norm()) for slope in wanted.values())
    for name, slope in wanted.items():
        assert float((slopes[name] - slope).norm()) <= 1e-4 * float(slope.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize("kind", FAST)
def test_the_proof_holds_in_bf16_too(kind):
    proven(kind, torch.bfloat16)


@pytest.mark.parametrize(("kind", "says"), [("gpt2", "made of wte"), ("gpt_neox", "made of embed_in")])
def test_an_architecture_of_other_parts_runs_by_its_modules_and_says_why(kind, says):
    model = lively_model(kind)
    assert forward.prove(model) is None
    decoder, reason = prove_decoder(model)
    assert decoder is None and says in reason
    base = small_base(kind)
    assert base.decoder is None and base.slow_reason == base.module_reason and says in base.slow_reason


def misread(change):
    """read_block with one constant of what it read changed."""
    read = reading.read_block
    return lambda layer, angles: dataclasses.replace(read(layer, angles), **change(read(layer, angles)))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", lambda b: {"before_mlp": b.before_mlp._replace(offset=1.0)}),
        ("llama", lambda b: {"qkv": (b.qkv[0], b.qkv[2], b.qkv[1])}),
        ("llama", lambda b: {"mlp": reading.Gate(b.mlp.layers[::-1], b.mlp.activation, b.mlp.down)}),
        ("llama", lambda b: {"mlp": reading.Gate(b.mlp.layers, "gelu", b.mlp.down)}),
        ("gemma2", lambda b: {"after_mlp": None}),
        ("gemma3", lambda b: {"angles": "full_attention"}),
        ("mistral", lambda b: {"heads": reading.Heads(b.heads.width, b.heads.scale)}),
        ("qwen3", lambda b: {"heads": reading.Heads(b.heads.width, b.heads.scale, k_norm=b.heads.k_norm)}),
        ("phi3", lambda b: {"heads": reading.Heads(b.heads.width, 2 * b.heads.scale)}),
    ],
)
def test_a_layer_that_was_read_wrongly_is_found_out(kind, change, monkeypatch):
    model = lively_model(kind).requires_grad_(False)
    assert forward.prove(model) is None
    monkeypatch.setattr(running, "read_block", misread(change))
    decoder, reason = prove_decoder(model)
    assert decoder is None and " its own by " in reason


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_in_bf16_the_proof_compares_in_fp32_what_is_stored_and_leaves_it_as_it_was(kind, quant, monkeypatch):
    model = lively_model(kind).to(torch.bfloat16).requires_grad_(False)
    layers = [layer for each in model.model.layers for _, layer in linear_layers(each)]
    if quant != "none":
        for layer in layers:
            exchange(layer, quantised_reader(layer, quant))
    assert forward.prove(model) is None
    before = [(layer.__class__, dict(layer.__dict__), layer.weight, layer.bias) for layer in layers]
    seen, measure = [], proof._measure
    monkeypatch.setattr(proof, "_measure", lambda *given: seen.append(measure(*given)) or seen[-1])
    decoder, reason = prove_decoder(model)
    assert decoder is not None, reason
    (states, slopes), (own_states, own_slopes) = seen
    assert states.dtype == torch.float32
    bound = 0.1 if kind == "mixtral" else 1e-4  # experts are called as they are, so in bf16
    torch.testing.assert_close(states, own_states, rtol=0, atol=bound * float(states.abs().max()))
    for name, slope in slopes.items():
        assert float((own_slopes[name] - slope).norm()) <= bound * float(slope.norm()) + 1e-6, name
    for layer, (kind_before, attributes, weight, bias) in zip(layers, before, strict=True):
        assert layer.__class__ is kind_before and layer.__dict__ == attributes
        assert layer.weight is weight and layer.bias is bias
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_proof_forms_weights_in_memory_that_does_not_grow_with_the_blocks():
    """In a process of its own: how far the proof raises its high-water mark, beside all blocks in fp32."""
    code = (
        "import torch, transformers\n"
        "from deltaw.base import forward\n"
        "from deltaw.base.proof import prove_decoder\n"
        "from deltaw.hardware import peak_rss_bytes\n"
        "torch.set_default_dtype(torch.bfloat16)\n"
        "sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=16, vocab_size=512)\n"
        "model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=8, **sizes))\n"
        "model.requires_grad_(False)\n"
        "torch.set_default_dtype(torch.float32)\n"
        "assert forward.prove(model) is None\n"
        "before = peak_rss_bytes()\n"
        "decoder, reason = prove_decoder(model)\n"
        "assert decoder is not None, reason\n"
        "print(peak_rss_bytes() - before, 4 * sum(weight.numel() for weight in model.model.layers.parameters()))\n"
    )
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread has memory of its own for products
    done = subprocess.run([sys.executable, "-c", code], env=one, capture_output=True, text=True, check=True)
    raised, blocks = map(int, done.stdout.split())
    assert 0 < raised < blocks / 4, (raised, blocks)


def test_kernels_that_are_wrong_in_bf16_alone_are_found_out(monkeypatch):
    model = lively_model("llama").to(torch.bfloat16).requires_grad_(False)
    assert forward.prove(model) is None
    right = running.rotary_attention
    monkeypatch.setattr(
        running, "rotary_attention", lambda q, *rest: right(q, *rest) * (1 + (q.dtype != torch.float32))
    )
    decoder, reason = prove_decoder(model)
    assert decoder is None and "in torch.bfloat16, differ from those in fp32" in reason


def test_a_backward_that_is_wrong_is_found_out_though_the_forward_is_right(monkeypatch):
    model = lively_model("llama").requires_grad_(False)
    assert forward.prove(model) is None
    true = block.factor_gradients
    monkeypatch.setattr(block, "factor_gradients", lambda *a: [-grad for grad in true(*a)])
    decoder, reason = prove_decoder(model)
    assert decoder is None and "gradient of" in reason and "differs" in reason


def test_the_proof_leaves_the_model_as_it_was():
    model, _ = proven("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    prove_decoder(model)
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == forward.ATTENTION_NAME


# -- when the modules run after all -----------------------------------------------------------------------------------


def changed_modules(model):
    def hooked():
        return model.model.layers[1].mlp.register_forward_hook(lambda *_: None).remove

    def replaced():
        model.model.norm.forward = model.model.norm.forward
        return lambda: model.model.norm.__dict__.pop("forward")

    return hooked, replaced


def test_where_someone_changed_a_module_the_modules_run_until_that_is_undone():
    base = small_base("llama")
    for change in changed_modules(base.model):
        assert base.slow_reason is None
        undo = change()
        assert "someone else changed" in base.slow_reason
        undo()
        assert base.slow_reason is None


@pytest.mark.parametrize(("options", "says"), [({"dora": True}, "DoRA"), ({"dropout": 0.1}, "dropout")])
def test_what_the_kernels_do_not_have_runs_by_the_modules_with_the_same_result(options, says):
    base = small_base("llama")
    batch = flat_batch([Example(d.int().numpy(), torch.ones(len(d)).numpy()) for d in some_documents((9, 20))])
    with inject(base.model, random_adapter(base.model, **options), trainable=True):
        assert says in base.slow_reason
        ours = batch_loss(base, batch)
        base.decoder = None
        assert torch.equal(ours, batch_loss(base, batch))


# -- parts of a run ---------------------------------------------------------------------------------------------------


def batch_with_few_labels():
    examples = []
    for document in some_documents((9, 20, 6)):
        weights = torch.zeros(len(document))
        weights[-2:] = 1
        examples.append(Example(document.int().numpy(), weights.numpy()))
    return flat_batch(examples)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"targets": ("q_proj", "v_proj"), "layers": (1,)}, {"targets": ("lm_head", "embed_tokens", "o_proj")}], ids=str)  # fmt: skip
def test_a_step_by_kernels_is_a_step_by_modules_whatever_is_adapted(kind, options):
    base, batch = small_base(kind), batch_with_few_labels()
    with inject(base.model, random_adapter(base.model, **options), trainable=True) as injection:
        assert base.slow_reason is None
        losses = []
        for decoder in (base.decoder, None):
            base.decoder = decoder
            losses.append(batch_loss(base, batch, head_factors(base, injection)))
        ours, plain = (gradients(loss, injection) for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert ours.keys() == plain.keys() and ours
    for name, slope in plain.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("step", [1, running.ROW_STEP])
def test_rows_of_the_last_layer_are_what_the_whole_row_has_there(step, monkeypatch):
    monkeypatch.setattr(running, "row_step", lambda _: step)
    _, decoder = proven("llama")
    tokens, positions, bounds = flat_row(some_documents((9, 20)))
    whole = decoder.hidden_states(tokens, positions, spans_of(bounds))
    rows = torch.tensor([3, 8, 20])
    torch.testing.assert_close(decoder.hidden_states(tokens, positions, spans_of(bounds), rows), whole[rows])
    assert decoder.hidden_states(tokens, positions, spans_of(bounds), rows[:0]).shape == (0, 32)


def test_rows_are_rounded_up_where_products_in_bf16_are_prepared_for_each_number_of_rows(monkeypatch):
    decoders = [proven("llama", dtype)[1] for dtype in (torch.float32, torch.bfloat16)]
    seen, run = [], running._run
    monkeypatch.setattr(running, "_run", lambda b, x, *rest: seen.append((len(x), len(rest[-1]))) or run(b, x, *rest))
    for decoder in decoders:
        decoder.blocks = decoder.blocks[-1:]
        tokens, positions, bounds = flat_row(some_documents((9, 20)))
        assert len(decoder.hidden_states(tokens, positions, spans_of(bounds), torch.tensor([3, 8, 20]))) == 3
    assert seen == [(29, 3), (32, 32)]


def test_the_active_adapter_and_its_strength_are_heard():
    base = small_base("llama")
    batch = batch_with_few_labels()
    first, second = (random_adapter(base.model, seed) for seed in (1, 2))
    plain = score_batch(base, batch).losses_N
    with inject(base.model, first, second) as injection:
        seen = []
        for active, strength in ((0, 1.0), (1, 1.0), (1, 0.5), (1, 0.0), (None, 1.0)):
            injection.active, injection.strength = active, strength
            ours = score_batch(base, batch).losses_N
            decoder, base.decoder = base.decoder, None
            torch.testing.assert_close(ours, score_batch(base, batch).losses_N, rtol=1e-4, atol=1e-5)
            base.decoder = decoder
            seen.append(ours)
        assert torch.equal(seen[3], plain) and torch.equal(seen[4], plain)
        assert len({float(losses.sum()) for losses in seen[:4]}) == 4


def test_nothing_below_the_lowest_adapter_asks_for_gradients(monkeypatch):
    model, decoder = proven("llama")
    tokens, positions, bounds = flat_row(some_documents((9, 20)))
    asked, run = [], running._run

    def watched(*args):
        out = run(*args)
        asked.append(out.requires_grad)
        return out

    monkeypatch.setattr(running, "_run", watched)
    with inject(model, random_adapter(model, layers=(1,)), trainable=True):
        decoder.hidden_states(tokens, positions, spans_of(bounds))
    assert asked == [False, True]


def test_documents_whose_angles_depend_on_each_other_go_alone():
    model = lively_model("phi3-long").requires_grad_(False)
    assert forward.prove(model) is None
    decoder, reason = prove_decoder(model)
    assert decoder is not None, reason
    assert not forward.may_be_flat(model, (0, 9, 60)) and forward.may_be_flat(model, (0, 9, 15))


def test_a_layer_whose_attention_the_model_never_called_is_not_read():
    with pytest.raises(reading.Unreadable, match="was not called"):
        Decoder(lively_model("llama"))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "qwen3", "mixtral"])
def test_what_documents_have_in_common_is_computed_once_with_the_same_loss_and_gradients(kind):
    base = small_base(kind)
    common, other = torch.randint(3, 250, (40,)), torch.randint(3, 250, (20,))
    documents = [torch.cat([common, torch.randint(3, 250, (n,))]) for n in (5, 1, 270)]
    documents += [torch.cat([other, torch.randint(3, 250, (4,))]) for _ in range(2)] + [torch.randint(3, 250, (30,))]
    examples = [Example(d.int().numpy(), (torch.rand(len(d)) < 0.6).float().numpy()) for d in documents]
    shared, flat = shared_batch(examples), flat_batch(examples)
    assert shared.computed_tokens < 0.8 * flat.computed_tokens and shared.tokens == flat.tokens == flat.computed_tokens
    assert shared.trained_tokens == flat.trained_tokens and shared.weight == flat.weight
    with inject(base.model, random_adapter(base.model), trainable=True) as injection:
        assert base.shares_prefixes
        losses = [batch_loss(base, batch) for batch in (shared, flat)]
        ours, plain = (gradients(loss, injection) for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for name, slope in plain.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-3, atol=2e-6)


def test_prefixes_are_shared_only_where_kernels_run_and_angles_do_not_depend_on_neighbours():
    base = small_base("llama")
    assert base.shares_prefixes
    with inject(base.model, random_adapter(base.model, dora=True)):
        assert not base.shares_prefixes
    assert not small_base("gpt2").shares_prefixes
    long = small_base("llama")
    long.model = lively_model("phi3-long")
    assert not long.shares_prefixes


def test_dropout_inside_a_part_that_runs_by_itself_is_none_of_the_kernels():
    """Passes that share a reading compute a block twice, with other random numbers."""
    config = transformers.LlamaConfig(**SMALL, hidden_act="relu")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    assert forward.prove(model) is None
    decoder, reason = prove_decoder(model)
    assert decoder is not None and decoder.blocks[0].other is not None, reason
    adapter = random_adapter(model, targets=("up_proj", "down_proj"), dropout=0.05)
    with inject(model, adapter, trainable=True):
        assert decoder.refusal() == "dropout runs by the model's modules"
    assert decoder.refusal() is None
