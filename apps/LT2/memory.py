"""Peak memory of a training step on one GPU, from a model on the meta device.

Weights, gradients, optimizer state and gathered weights are exact: the bytes of the tensors.
Activations are an estimate. It counts the tensors that a compiled block keeps for its backward: its
input, the results of matrix products and kernels, and with `none` also the inputs of these.
docs/benchmarking.md has its error against measured runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from apps.LT2.block import Block
from apps.LT2.flops import all_runs
from apps.LT2.kernel.fla import CHUNK
from apps.LT2.kernel.linear_cross_entropy import CHUNK_TOKENS
from apps.LT2.mixers import Mixer
from apps.LT2.mixers.attention import Attention
from apps.LT2.mixers.linear import LinearMixer
from apps.LT2.mixers.nsa import NativeSparseAttention
from apps.LT2.pattern import LayerSpec
from apps.LT2.transformer import LoopedTransformer
from lingua.optim import is_hidden_matrix, is_matrix
from lingua.parallel.args import (
    ACTIVATION_CHECKPOINTING,
    DistributedArgs,
    needs_fsdp,
    resolve_dtype,
)

FP32 = 4  # bytes
# What Inductor keeps beyond the rule without recomputation, in elements per value channel: the
# fp32 norm of retnet, the outputs of nsa's branches. Measured, docs/benchmarks.
KEPT_BY_NONE = {"retnet": 2.3, "nsa": 2.2}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the rank with the largest shards."""

    weights: int  # fp32 master weights
    optimizer: int
    gradients: int  # fp32, as the optimizer reads them
    gathered: int  # weight matrices of all shards in the compute dtype
    kept: dict[str, int]  # activations of a micro-batch between forward and backward, by mode
    peak: dict[str, int]  # of the whole step, by mode of activation checkpointing


def training_memory(
    model: LoopedTransformer,
    args: DistributedArgs,
    *,
    batch_size: int,
    seqlen: int,
    grad_acc_steps: int = 1,
    muon: bool = False,
) -> TrainingMemory:
    """Return the memory of a step on CUDA; `args.dp_replicate` must be the real one."""
    n_shards = _n_shards(args)
    world_size = args.dp_replicate * args.dp_shard * args.tp_size
    uses_fsdp = needs_fsdp(args, world_size, "cuda")
    width = resolve_dtype(args.model_dtype, "cuda").itemsize
    weights = optimizer = gathered = layers = whole = 0
    for name, param, rows, row in _local_shapes(model, args.tp_size):
        n = shard = rows * row
        whole += n
        if is_matrix(name, param):
            shard = -(-rows // n_shards) * row
            is_layer = name.startswith("layers.")
            layers += n * is_layer
            freed = is_layer and args.reshard_between_loops
            gathered += uses_fsdp * width * n * (2 / model.args.n_layers if freed else 1)
        weights += FP32 * shard
        # AdamW has two moments and a step count, Muon a momentum.
        optimizer += FP32 * (shard if muon and is_hidden_matrix(name, param) else 2 * shard + 1)
    resident = weights + optimizer + int(gathered)
    # Micro-batches and loops add to whole fp32 gradients, which are reduced at the end.
    accumulated = FP32 * whole if grad_acc_steps > 1 else 0
    n_loops = model.n_backward_loops(model.n_loops)
    looped = max(accumulated, FP32 * layers if n_loops > 1 else 0)

    tokens = batch_size * seqlen
    head, buffers, gradients = _loss_bytes(model, tokens, width, args.tp_size)
    kept, peak = {}, {}
    for mode in ACTIVATION_CHECKPOINTING:
        body, recomputed = _body_bytes(model, mode, width, tokens, seqlen, args.tp_size)
        kept[mode] = body + head
        at_loss = resident + accumulated + kept[mode] + buffers
        # After the backward of one loop, all layers have gradients.
        rest = body - body // n_loops
        at_backward = resident + looped + gradients + rest + recomputed
        peak[mode] = max(at_loss, at_backward, weights + optimizer + weights)
    return TrainingMemory(weights, optimizer, weights, int(gathered), kept, peak)


def _n_shards(args: DistributedArgs) -> int:
    """Return how many ranks share a weight matrix, besides tensor parallelism."""
    if args.fsdp_type == "full_shard" and args.dp_shard == 1:
        return args.dp_replicate
    return args.dp_shard


def _local_shapes(
    model: LoopedTransformer, tp_size: int
) -> Iterator[tuple[str, nn.Parameter, int, int]]:
    """Yield (name, parameter, rows, elements of a row) of a tensor-parallel rank."""
    splits_vocabulary = model.args.vocab_size % tp_size == 0
    for name, param in model.named_parameters():
        rows, row = param.shape[0], param.shape[1:].numel()
        if name.endswith((".wo.weight", ".w2.weight")):
            row //= tp_size  # split by inputs
        elif is_matrix(name, param) and (name.startswith("layers.") or splits_vocabulary):
            rows //= tp_size
        yield name, param, rows, row


def _loss_bytes(
    model: LoopedTransformer, tokens: int, width: int, tp_size: int
) -> tuple[int, int, int]:
    """Return the bytes that the loss keeps, its temporary buffers, and its gradients.

    The last are what the loss leaves to the backward of the loops.
    """
    dim, vocabulary = model.args.dim, model.args.vocab_size
    if vocabulary % tp_size == 0:
        vocabulary //= tp_size
    n_loops, state = model.n_loops, width * tokens * dim
    n_backward = model.n_backward_loops(n_loops)
    early = cut_off = waiting = 0
    if model.args.loop_loss != "none":
        early = width * dim * (n_loops - 1) * -(-tokens // model.args.loop_loss_every)
        # The backward begins with the last of these states, so its loop keeps that one.
        cut_off = max(n_loops - n_backward - 1, 0) * state
        waiting = (n_backward - 1) * state
    # Gradients of the hidden states and of the weight; the input of the final norm.
    last = 2 * state + FP32 * vocabulary * dim
    # Logits of this chunk and the one before in fp32, and their gradient. With a loss of every
    # loop, all normed states wait for it.
    chunk = min(tokens, CHUNK_TOKENS) * vocabulary
    buffers = early + chunk * (width + FP32 * (2 if tokens > CHUNK_TOKENS else 1))
    return last + early + cut_off, buffers, last + waiting


def _body_bytes(
    model: LoopedTransformer, mode: str, width: int, tokens: int, seqlen: int, tp_size: int
) -> tuple[int, int]:
    """Return the bytes that loops with a backward keep, and what recomputation adds in it."""
    T, stream = model.n_backward_loops(model.n_loops), width * model.args.dim
    gates = 0 if model.rho is None else FP32 * model.args.dim  # the input of a loop in fp32
    runs = list(all_runs(model, model.layout[-T:]))
    whole = [_block_bytes(*run, width, seqlen, tp_size, recompute=False) for run in runs]
    if mode == "none":
        kept, again = sum(whole) + T * gates, 0
    elif mode == "selective":
        partly = [_block_bytes(*run, width, seqlen, tp_size, recompute=True) for run in runs]
        kept, again = sum(partly) + T * gates, 0
    elif mode == "full":
        kept, again = len(runs) * stream + T * gates, max(whole)
    else:
        n = model.args.n_layers
        loops = [sum(whole[t * n : (t + 1) * n]) for t in range(T)]
        kept, again = T * stream, max(loops) + gates
    return tokens * kept, tokens * again


def _block_bytes(
    block: Block, spec: LayerSpec, width: int, seqlen: int, tp_size: int, *, recompute: bool
) -> int:
    """Return the bytes per token that a block keeps for its backward.

    recompute: only its input and the results of matrix products and kernels.
    """
    mixer, feed_forward = block.mixer(spec), block.feed_forward
    linears = {name: m for name, m in mixer.named_modules() if isinstance(m, nn.Linear)}
    projected = sum(m.out_features for name, m in linears.items() if name != "wo")
    split = projected + mixer.wo.in_features + 2 * feed_forward.hidden_dim
    whole = 2 * feed_forward.dim  # the block's input, and the sum with the mixer's output
    if not recompute:
        split += feed_forward.hidden_dim + _kernel_inputs(mixer)
        whole += 2 * feed_forward.dim  # after the norms
    shared = width * split + _kernel_bytes(mixer, width, seqlen)
    return width * whole + shared // tp_size


def _kernel_bytes(mixer: Mixer, width: int, seqlen: int) -> int:
    """Return what a mixer's kernels keep per token, besides their first output."""
    heads = mixer.n_heads
    if not isinstance(mixer, LinearMixer):
        results = {"nsa": 2 * width * mixer.wo.in_features, "dsa": seqlen // 8}  # branches; a mask
        return results.get(mixer.module_name, 0) + FP32 * heads
    decays = FP32 * heads * mixer.key_dim  # summed over a chunk
    matrix = heads * CHUNK  # of the tokens in a chunk
    return {
        "gdn": width * matrix,
        "deltanet": width * matrix,
        "kda": 2 * width * matrix + decays,
        "gla": FP32 * matrix + decays,
        "hgrn2": FP32 * matrix + decays,
    }.get(mixer.module_name, FP32 * heads)


def _kernel_inputs(mixer: Mixer) -> int:
    """Return the elements per token that only `none` keeps: inputs of kernels and of wo."""
    values = mixer.wo.in_features
    if isinstance(mixer, LinearMixer):
        conv = mixer.conv.channels if mixer.conv is not None else 0
        made = 2 * mixer.n_heads * mixer.key_dim if mixer.module_name == "hgrn2" else 0  # q and k
        extra = 2 * conv + made + values  # the convolution's result, then q, k and v
    else:
        extra = values if getattr(mixer, "wg", None) is not None else 0
        if isinstance(mixer, Attention | NativeSparseAttention) and mixer.q_norm is not None:
            extra += (mixer.n_heads + mixer.n_kv_heads) * mixer.head_dim  # after the norms
    return extra + int(KEPT_BY_NONE.get(mixer.module_name, 0) * values)
