"""One loop of full attention is a Llama: the same weights give the same logits.

Checked against transformers' LlamaForCausalLM and against lingua's reference Transformer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.transformer import BaseTransformer, BaseTransformerArgs
from tests.tolerances import FP32_MODEL, assert_same

ARGS = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "multiple_of": 16,
    "norm_eps": 1e-3,  # large, to reveal a norm with another epsilon
    "rope_theta": 500.0,
    "max_seqlen": 32,
}
VOCAB, T = 61, 23
HEADS = pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
# The reference has no cached decoding; ours must equal its full forward.
DECODED = pytest.mark.parametrize("decoded", [False, True], ids=["forward", "decoded"])


def make(n_kv_heads: int, weight_tying: bool = False) -> LoopedTransformer:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        **ARGS,
        n_kv_heads=n_kv_heads,
        vocab_size=VOCAB,
        loop_count=1,
        mixer="full",
        use_residual=False,
        weight_tying=weight_tying,
    )
    model = LoopedTransformer(args)
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p += 0.3 * torch.randn_like(p)
            elif "wq" in name or "wk" in name:
                p *= 3  # sharper attention: positions matter
    return model


def logits(model: LoopedTransformer, tokens: Tensor, decoded: bool) -> Tensor:
    if not decoded:
        return model(tokens)
    cache = model.init_cache(tokens.shape[0], tokens.shape[1])
    parts = [model.prefill(tokens[:, :9], cache)]
    parts += [model.step(token, cache) for token in tokens[:, 9:].split(1, 1)]
    return torch.cat(parts, 1)


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of a projection from rotary pairs (2i, 2i+1) to (i, i + K / 2)."""
    pairs = weight.unflatten(0, (n_heads, -1, 2))  # heads, pairs, 2, dim
    return pairs.transpose(1, 2).flatten(0, 2)


def hugging_face_llama(model: LoopedTransformer):
    transformers = pytest.importorskip("transformers")
    args, block = model.args, model.layers[0]
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=args.dim,
        intermediate_size=block.feed_forward.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        max_position_embeddings=args.max_seqlen,
        tie_word_embeddings=args.weight_tying,
    )
    weights = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head_weight,
    }
    for i, block in enumerate(model.layers):
        attention, ffn = block.attention, block.feed_forward
        ours = {
            "input_layernorm": block.attention_norm.weight,
            "self_attn.q_proj": half_split(attention.wq.weight, args.n_heads),
            "self_attn.k_proj": half_split(attention.wk.weight, args.n_kv_heads),
            "self_attn.v_proj": attention.wv.weight,
            "self_attn.o_proj": attention.wo.weight,
            "post_attention_layernorm": block.ffn_norm.weight,
            "mlp.gate_proj": ffn.w1.weight,
            "mlp.up_proj": ffn.w3.weight,
            "mlp.down_proj": ffn.w2.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in ours.items()}
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict({name: w.detach() for name, w in weights.items()})
    return llama


@HEADS
@DECODED
@pytest.mark.parametrize("weight_tying", [False, True], ids=["untied", "tied"])
def test_equals_transformers_llama(n_kv_heads, decoded, weight_tying):
    model = make(n_kv_heads, weight_tying)
    llama = hugging_face_llama(model)
    tokens = torch.randint(VOCAB, (2, T))
    with torch.no_grad():
        assert_same(logits(model, tokens, decoded), llama(tokens).logits, FP32_MODEL)


def test_loss_equals_transformers_llama():
    model = make(2)
    llama = hugging_face_llama(model)
    tokens = torch.randint(VOCAB, (2, T + 1))
    labels = tokens.clone()
    labels[0, 3:9] = -100
    with torch.no_grad():
        want = llama(tokens, labels=labels).loss  # shifts by one itself
        assert_same(model(tokens[:, :-1], target=labels[:, 1:]), want, FP32_MODEL)


@HEADS
@DECODED
def test_equals_linguas_reference_transformer(n_kv_heads, decoded):
    """Parameter names are the same, so a checkpoint of one loads into the other."""
    model = make(n_kv_heads)
    reference = BaseTransformer(BaseTransformerArgs(**ARGS, n_kv_heads=n_kv_heads))
    layers = {k: v for k, v in model.state_dict().items() if k.startswith("layers.")}
    reference.load_state_dict(layers)
    tokens = torch.randint(VOCAB, (2, T))
    with torch.no_grad():
        h = reference(model.tok_embeddings(tokens))
        want = model.norm(h) @ model.output.weight.T
        assert_same(logits(model, tokens, decoded), want, FP32_MODEL)
