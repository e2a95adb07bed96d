"""The looped Transformer: embed, run one stack of layers T times, normalise, project.

    h = E[x]
    for t in 0 .. T-1:
        u = h
        for layer in stack:  h = h + mixer(norm(h));  h = h + ffn(norm(h))
        h = h + rho[t] * u                       learned, zero at the start (use_residual)
    logits = head(norm(h))

Only h crosses loops: every mixer starts each loop with an empty past, so decoding keeps one cache
for every (loop, layer). Shapes: B sequences, T tokens (and T loops, where loops are meant), D model
width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apps.LT2.block import Block
from apps.LT2.cache import ModelCache, packed_lengths
from apps.LT2.kernel.attention import check_attention_impl
from apps.LT2.kernel.documents import upload
from apps.LT2.kernel.linear_cross_entropy import linear_cross_entropy
from apps.LT2.mixers import MIXERS, MixerArgs
from apps.LT2.mixers.deltanet import DeltaNetArgs
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.gla import GLAArgs
from apps.LT2.mixers.hgrn2 import HGRN2Args
from apps.LT2.mixers.kda import KDAArgs
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.mixers.retnet import RetNetArgs
from apps.LT2.pattern import LayerSpec, Layout, LayoutPlan, PatternParser
from lingua.errors import UserError
from lingua.parallel.tensor_parallel import local_weight, tp_of
from lingua.transformer import (
    RMSNorm,
    depth_factor,
    init_linear,
    trunc_normal_,
)

logger = logging.getLogger(__name__)


@dataclass
class LoopedTransformerArgs(MixerArgs):
    seed: int | None = None  # seed of the initial weights; null = the run's seed
    vocab_size: int = -1  # pieces of the vocabulary; -1 = the tokenizer's
    weight_tying: bool = False  # the head is the transposed embedding
    sliding_window: int | None = None  # turns every full layer into a window of this width
    loop_count: int = 1  # T: how often the stack runs; effective depth = n_layers * T
    mixer: str = "full"  # token mixer, a name in apps.LT2.mixers.MIXERS
    attention_pattern: str | None = None  # layout over depth and loops; null = mixer everywhere
    hybrid_mixer: str = "full"  # the second family of a pattern such as "4:1"
    attn_impl: str = "auto"  # softmax backend: auto | fmha | flex_attention | sdpa | naive
    default_sliding_window: int = 2048  # keys that a window layer sees, the token itself included
    use_residual: bool = True  # learned per-loop gate rho (T, dim), zero at the start
    gated_attn: bool = False  # sigmoid output gate on softmax attention
    gdn: GatedDeltaNetArgs = field(default_factory=GatedDeltaNetArgs)
    kda: KDAArgs = field(default_factory=KDAArgs)
    mamba2: Mamba2Args = field(default_factory=Mamba2Args)
    hgrn2: HGRN2Args = field(default_factory=HGRN2Args)
    deltanet: DeltaNetArgs = field(default_factory=DeltaNetArgs)
    retnet: RetNetArgs = field(default_factory=RetNetArgs)
    nsa: NSAArgs = field(default_factory=NSAArgs)
    dsa: DSAArgs = field(default_factory=DSAArgs)
    gla: GLAArgs = field(default_factory=GLAArgs)

    def layout(self) -> Layout:
        """What runs at each (loop, layer) in evaluation and inference."""
        return self.layout_plan().draw(None)

    def layout_plan(self) -> LayoutPlan:
        """The layout of every training step; UserError where attention_pattern does not fit."""
        plan = PatternParser(
            n_layers=self.n_layers,
            loop_count=self.loop_count,
            mixer=self.mixer,
            hybrid_mixer=self.hybrid_mixer,
            default_sliding_window=self.default_sliding_window,
            known_mixers=tuple(MIXERS),
            seed=self.seed or 0,
        ).parse(self.attention_pattern)
        if self.sliding_window is None:
            return plan
        if self.sliding_window < 1:
            raise UserError(
                f"model.sliding_window={self.sliding_window} must be at least 1, or null"
            )
        narrowed = LayerSpec("window", self.sliding_window)
        return plan.map(lambda spec: narrowed if spec.mixer == "full" else spec)


class LoopedTransformer(nn.Module):
    def __init__(self, args: LoopedTransformerArgs):
        """Allocates, and fills nothing: call `init_weights` or load a checkpoint."""
        super().__init__()
        if args.vocab_size < 1:
            raise UserError(
                f"model.vocab_size={args.vocab_size} must be positive (-1 is the tokenizer's size, "
                "which only the trainer can fill in)"
            )
        if args.dim < 1:
            raise UserError(f"model.dim={args.dim} must be at least 1")
        self.args = args
        self.layout_plan = args.layout_plan()
        # Cached decoding always runs the layout of inference; `forward` that of the step.
        self.layout = self.inference_layout = self.layout_plan.draw(None)
        windowed = any(spec.window is not None for loop in self.layout for spec in loop)
        check_attention_impl(args.attn_impl, windowed=windowed)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(
            Block(args, column) for column in zip(*self.layout, strict=True)
        )
        self.norm = RMSNorm(args.dim, args.norm_eps)
        if not args.weight_tying:
            self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.rho = (
            nn.Parameter(torch.empty(args.loop_count, args.dim)) if args.use_residual else None
        )
        # Activation checkpointing of whole loops, which only the model can see; set by the trainer.
        self.checkpoint_loops = False
        # Whether sharded layers are gathered for each loop anew, and what the backward calls when
        # it enters loop 0 and meets every layer for the last time; both are apps.LT2.parallel's.
        self.reshard_between_loops = False
        self.before_last_backward: Callable[[], None] | None = None
        # Of the last forward with a target: mean over (loop, layer) of the mixers' own losses.
        self.mixer_losses: dict[str, Tensor] = {}

    def forward(
        self, tokens_BT: Tensor, target: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) in fp32, or with `target` (B, T) the mean cross-entropy.

        Targets of -100 carry no loss. With `cu_seqlens` the batch is 1 and documents, laid one
        after the other, do not see each other.
        """
        with_loss = target is not None and torch.is_grad_enabled()
        if cu_seqlens is not None and not torch.compiler.is_compiling():
            # Compiled blocks serve any number of documents.
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        h = self.tok_embeddings(tokens_BT)
        mixer_losses: dict[str, list[Tensor]] = {}
        for loop in range(self.args.loop_count):
            if self.checkpoint_loops and torch.is_grad_enabled():
                h, losses = checkpoint(
                    self._run_loop, h, loop, cu_seqlens, with_loss, use_reentrant=False
                )  # pyright: ignore[reportGeneralTypeIssues]
            else:
                h, losses = self._run_loop(h, loop, cu_seqlens, with_loss)
            for name, loss in losses:
                mixer_losses.setdefault(name, []).append(loss)
            if loop == 0 and h.requires_grad:
                h.register_hook(self._enter_last_backward)
        h = self.norm(h)
        if target is None:
            return self._logits(h)
        loss = linear_cross_entropy(
            h.flatten(0, 1), self.head_weight, target.flatten(), tp=tp_of(self.head)
        )
        return self._add_mixer_losses(loss, mixer_losses)

    @torch.no_grad()
    def hidden_states(self, tokens_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """What the head reads, (B, T, D); logits are `hidden @ head_weight.T`.

        For whoever needs the logits of some tokens only: those of all tokens would take more
        memory than the model, with 100,000 words and more.
        """
        h = self.tok_embeddings(tokens_BT)
        for loop in range(len(self.layout)):
            h, _ = self._run_loop(h, loop, cu_seqlens, False)
        return self.norm(h)

    def _add_mixer_losses(self, loss: Tensor, mixer_losses: dict[str, list[Tensor]]) -> Tensor:
        """`loss` with its value as it is, and with the gradient of the mixers' own losses too."""
        self.mixer_losses = {}
        for name, losses in mixer_losses.items():
            mean = torch.stack(losses).mean()
            self.mixer_losses[name] = mean.detach()
            loss = loss + (mean - mean.detach())
        return loss

    def _enter_last_backward(self, grad: Tensor) -> None:
        if self.before_last_backward is not None:
            self.before_last_backward()

    def begin_step(self, step: int | None) -> None:
        """Set what depends on the training: `step` optimizer steps are done, None is inference.

        Random layouts are drawn, from the model's seed and `step` alone.
        """
        self.layout = self.layout_plan.draw(step)
        for block in self._blocks():
            for mixer in block.mixers():
                mixer.begin_step(step)

    def own_loss_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The weights that the mixers' own losses train, and nothing else does, by loss."""
        weights: dict[str, list[nn.Parameter]] = {}
        for block in self._blocks():
            for mixer in block.mixers():
                if mixer.loss_name is not None:
                    weights.setdefault(mixer.loss_name, []).extend(mixer.own_loss_parameters())
        return weights

    @property
    def head(self) -> nn.Embedding | nn.Linear:
        """The module whose weight makes the logits."""
        return self.tok_embeddings if self.args.weight_tying else self.output

    @property
    def head_weight(self) -> Tensor:
        """(V, D); under tensor parallelism the rows of this rank's pieces."""
        return local_weight(self.head)

    def init_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelCache:
        """An empty cache of `batch_size` rows; device and dtype are the embedding's by default."""
        weight = self.tok_embeddings.weight
        options: dict[str, Any] = {
            "device": device or weight.device,
            "dtype": dtype or weight.dtype,
        }
        mixers = [
            [
                block.mixer(spec).init_cache(batch_size, max_seqlen, window=spec.window, **options)
                for block, spec in zip(self._blocks(), loop, strict=True)
            ]
            for loop in self.inference_layout
        ]
        return ModelCache(mixers, max_seqlen, [0] * batch_size)

    @torch.no_grad()
    def prefill(
        self,
        tokens_BT: Tensor,
        cache: ModelCache,
        *,
        cu_seqlens: Tensor | None = None,
        rows: Sequence[int] | Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Extend the cached sequences by prompts; logits (B, T, V) of every position, in fp32.

        rows (n,) int64 says which cache row each sequence (each document, when packed) goes on
        with; by default sequence i is row i. The host needs them and the bounds as numbers: a list,
        and bounds of `upload_cu_seqlens`, keep it from waiting for the device.
        last_only: (n, 1, V), each sequence's last position, of which an empty document has none.
        """
        lengths = packed_lengths(tokens_BT, cu_seqlens)
        assert not last_only or min(lengths) > 0, f"no last position in sequences of {lengths}"
        if rows is None:
            past = cache.extend(range(len(lengths)), lengths)
        else:
            numbers = rows.tolist() if isinstance(rows, Tensor) else rows
            past = cache.extend(numbers, lengths)
            rows = upload(numbers, tokens_BT.device, torch.int64)
        h = self.tok_embeddings(tokens_BT)
        for loop in range(self.args.loop_count):
            u = h
            for block, spec, memory in self._with_cache(loop, cache):
                h = block.prefill(h, spec, memory, cu_seqlens, rows, past)
            h = self._join(h, u, loop)
        if last_only:
            h = h[:, -1:] if cu_seqlens is None else h[0, cu_seqlens[1:].long() - 1][:, None]
        return self._logits(self.norm(h))

    @torch.no_grad()
    def step(self, tokens_B1: Tensor, cache: ModelCache) -> Tensor:
        """One token for every row of the cache, in place; logits (B, 1, V) in fp32."""
        cache.extend(range(cache.batch_size), [1] * cache.batch_size)
        h = self.tok_embeddings(tokens_B1)
        for loop in range(self.args.loop_count):
            u = h
            for block, spec, memory in self._with_cache(loop, cache):
                h = block.step(h, spec, memory)
            h = self._join(h, u, loop)
        return self._logits(self.norm(h))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every tensor from torch's global generator; the same rule for every mixer."""
        args = self.args
        std = args.init_base_std if args.init_base_std is not None else args.dim**-0.5
        trunc_normal_(self.tok_embeddings.weight, std)
        for i, block in enumerate(self._blocks()):
            factor = depth_factor(
                args.init_std_factor,
                dim=args.dim,
                layer=i,
                n_layers=args.n_layers,
                loop_count=args.loop_count,
            )
            block.init_weights(args.init_base_std, factor)
        self.norm.reset_parameters()
        if not args.weight_tying:
            init_linear(self.output, args.init_base_std)
        if self.rho is not None:
            nn.init.zeros_(self.rho)

    def _blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def _with_cache(self, loop: int, cache: ModelCache) -> Any:
        return zip(self._blocks(), self.inference_layout[loop], cache.mixers[loop], strict=True)

    def _run_loop(
        self, h: Tensor, loop: int, cu_seqlens: Tensor | None, with_loss: bool
    ) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """h after a loop, and the losses of its mixers by name."""
        u, losses = h, []
        for block, spec in zip(self.layers, self.layout[loop], strict=True):
            h, loss = block(h, spec, cu_seqlens, with_loss)
            if loss is not None:
                losses.append((MIXERS[spec.mixer].loss_name, loss))
        return self._join(h, u, loop), losses

    def _join(self, h: Tensor, u: Tensor, loop: int) -> Tensor:
        """h + rho[loop] * u in fp32, h's dtype outside."""
        if self.rho is None:
            return h
        return (h.float() + self.rho[loop].float() * u.float()).type_as(h)

    def _logits(self, h: Tensor) -> Tensor:
        tp = tp_of(self.head)
        return tp.gather_from(F.linear(tp.copy_to(h), self.head_weight)).float()


def fit_loop_gates(rho_TD: Tensor, loop_count: int) -> Tensor:
    """Gates for another loop count than was trained: extra loops reuse the last row."""
    n_trained = rho_TD.shape[0]
    if n_trained == loop_count:
        return rho_TD
    logger.warning(
        "model.loop_count=%d on weights trained with %d loops: %s",
        loop_count,
        n_trained,
        "extra loops reuse the last residual gate"
        if loop_count > n_trained
        else "the gates of the last loops are not used",
    )
    extra = rho_TD[-1:].expand(max(loop_count - n_trained, 0), -1)
    return torch.cat((rho_TD[:loop_count], extra))
