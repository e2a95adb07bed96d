"""The looped Transformer: embed, run one stack of layers T times, normalize, project.

    h = E[x]
    for t in 0 .. T-1:
        u = h
        for layer in stack:  h = h + mixer(norm(h));  h = h + ffn(norm(h))
        h = h + rho[t] * u                       learned, zero at the start (use_residual)
    logits = head(norm(h))

Only h passes from loop to loop. Every mixer starts each loop with an empty past, so decoding keeps
one cache for every (loop, layer). Shapes: B sequences, T tokens (or T loops), D model dim, V tokens
of the vocabulary.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apps.LT2.block import Block
from apps.LT2.cache import ModelCache, packed_lengths
from apps.LT2.kernel.attention import check_attention_impl
from apps.LT2.kernel.documents import constant, upload
from apps.LT2.kernel.exit_gate import exit_logit
from apps.LT2.kernel.linear_cross_entropy import (
    linear_cross_entropy,
    weighted_linear_cross_entropy,
)
from apps.LT2.loop_loss import (
    ExitGate,
    check_loop_loss,
    check_loops_with_weight,
    log_exit_distribution,
    loop_weights,
)
from apps.LT2.loops import LoopPlan, parse_loop_plan
from apps.LT2.mixers import MIXERS, Mixer, MixerArgs, Prompts
from apps.LT2.mixers.deltanet import DeltaNetArgs
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.gla import GLAArgs
from apps.LT2.mixers.hgrn2 import HGRN2Args
from apps.LT2.mixers.kda import KDAArgs
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.mixers.retnet import RetNetArgs
from apps.LT2.mixers.rotary import RopeScalingArgs
from apps.LT2.pattern import LayerSpec, Layout, LayoutPlan, PatternParser
from lingua.dataloader.packing import NO_TARGET
from lingua.errors import UserError
from lingua.logger import log_on_rank_0
from lingua.parallel.tensor_parallel import local_weight, tp_of
from lingua.transformer import RMSNorm, depth_factor, init_linear, trunc_normal_

# Weights that other checkpoints lack: Lingua's have no loops, and other losses no exit gate.
ZERO_IF_MISSING = ("rho", "exit_gate.weight", "exit_gate.bias")
# Weights whose shape depends on loop_count -> a function of the stored tensor and loop_count.
RESIZED: dict[str, Callable[[Tensor, int], Tensor]] = {"rho": lambda rho, T: fit_loop_gates(rho, T)}


@dataclass
class LoopedTransformerArgs(MixerArgs):
    seed: int | None = None  # seed of the initial weights; null = the run's seed
    vocab_size: int = -1  # tokens of the vocabulary; -1 = the tokenizer's
    weight_tying: bool = False  # the head uses the embedding's weight
    sliding_window: int | None = None  # turns every full layer into a window of this size
    loop_count: int = 1  # T: how often the stack runs; effective depth = n_layers * T
    loop_schedule: str | None = None  # T in training by share of steps, e.g. "1@0, 2@0.2, 4@0.5"
    loop_sample: str | None = None  # T drawn in each training step: uniform:1,2,4 or poisson:MEAN
    loop_bptt: int | None = None  # gradients go through the last loops only; null = through all
    loop_loss: Any = (
        "none"  # loops with a loss: none (the last) | uniform | a list of weights | gate
    )
    loop_entropy: float = 0.1  # weight of the entropy of the exits in loop_loss=gate
    loop_loss_every: int = 1  # loops before the last have a loss on every k-th token, times k
    mixer: str = "full"  # token mixer, a name in apps.LT2.mixers.MIXERS
    attention_pattern: str | None = None  # layout over depth and loops; null = mixer everywhere
    hybrid_mixer: str = "full"  # the second family of a pattern such as "4:1"
    attn_impl: str = "auto"  # softmax backend: auto | fmha | flex_attention | sdpa | naive
    default_sliding_window: int = 2048  # keys that a window layer sees, the token itself included
    use_residual: bool = True  # learned per-loop gate rho (T, dim), zero at the start
    gated_attn: bool = False  # sigmoid output gate on softmax attention
    attn_bias: str = "none"  # biases of softmax attention: none | qkv | qkvo (output too)
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotation
    rope_scaling: RopeScalingArgs | None = None  # longer contexts; null = no scaling
    mixer_norm_eps: float | None = None  # epsilon of a linear mixer's output norm; null = norm_eps
    gdn: GatedDeltaNetArgs = field(default_factory=GatedDeltaNetArgs)
    kda: KDAArgs = field(default_factory=KDAArgs)
    mamba2: Mamba2Args = field(default_factory=Mamba2Args)
    hgrn2: HGRN2Args = field(default_factory=HGRN2Args)
    deltanet: DeltaNetArgs = field(default_factory=DeltaNetArgs)
    retnet: RetNetArgs = field(default_factory=RetNetArgs)
    nsa: NSAArgs = field(default_factory=NSAArgs)
    dsa: DSAArgs = field(default_factory=DSAArgs)
    gla: GLAArgs = field(default_factory=GLAArgs)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixer_norm_eps is not None and not self.mixer_norm_eps > 0:
            raise UserError(
                f"model.mixer_norm_eps={self.mixer_norm_eps} must be above 0, or null for "
                "model.norm_eps"
            )
        if self.loop_bptt is not None and not 1 <= self.loop_bptt <= self.loop_count:
            raise UserError(
                f"model.loop_bptt={self.loop_bptt} must be from 1 to model.loop_count="
                f"{self.loop_count}, or null"
            )
        check_loop_loss(self.loop_loss, self.loop_count)
        if not self.loop_entropy >= 0:
            raise UserError(f"model.loop_entropy={self.loop_entropy} must be at least 0")
        if self.loop_loss_every < 1:
            raise UserError(f"model.loop_loss_every={self.loop_loss_every} must be at least 1")

    def with_loops(self, loop_count: int) -> LoopedTransformerArgs:
        """Return the options of a model that always runs `loop_count` loops, for inference.

        It keeps an exit gate.
        """
        fixed = {"loop_schedule": None, "loop_sample": None, "loop_bptt": None}
        loop_loss = "gate" if self.loop_loss == "gate" else "none"
        fixed |= {"loop_loss": loop_loss, "loop_loss_every": 1}
        return replace(self, loop_count=loop_count, **fixed)

    def loop_plan(self) -> LoopPlan:
        """Return T of all training steps; UserError for a mistake in its options."""
        return parse_loop_plan(
            self.loop_count, self.loop_schedule, self.loop_sample, self.seed or 0
        )

    def layout(self) -> Layout:
        """Return what runs at each (loop, layer) in evaluation and inference."""
        return self.layout_plan().draw(None)

    def layout_of(self, loop_count: int) -> Layout:
        """Return the layout of inference with another number of loops; loop t runs segment t.

        UserError if the pattern has fewer segments, or for a number below 1.
        """
        if loop_count < 1:
            raise UserError(f"loop_count={loop_count} must be at least 1")
        if loop_count > self.loop_count and "->" in str(self.attention_pattern):
            raise UserError(
                f"loop_count={loop_count}: model.attention_pattern={self.attention_pattern!r} has "
                f"{self.loop_count} segments; use 1 to {self.loop_count} loops"
            )
        return self.with_loops(max(loop_count, self.loop_count)).layout()[:loop_count]

    def layout_plan(self) -> LayoutPlan:
        """Return the layouts of all training steps; UserError if attention_pattern doesn't fit."""
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


# (block, h, spec, and the cache if there is one) -> (h, the mixer's own loss or None)
RunLayer = Callable[..., tuple[Tensor, Tensor | None]]
Losses = list[tuple[str, Tensor]]  # (name, own loss) of every (loop, layer) that has one


class LoopedTransformer(nn.Module):
    def __init__(self, args: LoopedTransformerArgs):
        """Allocate the parameters; `init_weights` or a checkpoint fills them."""
        super().__init__()
        if args.vocab_size < 1:
            raise UserError(
                f"model.vocab_size={args.vocab_size} must be at least 1; only the trainer replaces "
                "-1 by the tokenizer's size"
            )
        if args.dim < 1:
            raise UserError(f"model.dim={args.dim} must be at least 1")
        self.args = args
        self.layout_plan, self.loop_plan = args.layout_plan(), args.loop_plan()
        check_loops_with_weight(args.loop_loss, self.loop_plan.shares())
        # Cached decoding always runs the layout of inference, `forward` the one of the step.
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
        self.exit_gate = ExitGate(args.dim) if args.loop_loss == "gate" else None
        # Activation checkpointing of whole loops; set by the trainer.
        self.checkpoint_loops = False
        # Whether FSDP gathers the layers again for each loop; set by the trainer.
        self.reshard_between_loops = False
        # Runs when the backward enters its last pass, loop 0 without loop_bptt; set by
        # apps.LT2.parallel.
        self.before_last_backward: Callable[[], None] | None = None
        # The mean over (loop, layer) of the mixers' own losses, of the last forward with a target.
        self.mixer_losses: dict[str, Tensor] = {}
        self.loop_loss_offset = 0  # the first token on which loops before the last have a loss
        # What loop_loss and n_answers measured in the last forward with a target, by metric key.
        self.loop_metrics: dict[str, Tensor] = {}
        # The targets in the next batch, to measure their accuracy; None = not measured.
        self.n_answers: int | None = None

    def forward(
        self,
        tokens_BT: Tensor,
        target: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        n_targets: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) in fp32, or with `target` (B, T) the mean cross-entropy.

        The cross-entropy is the last loop's. Its gradients come from model.loop_loss and
        the mixers' own losses. Targets of -100 are ignored. With `cu_seqlens` the batch is 1, and
        documents don't see each other. The sum is divided by `n_targets`, () in fp32; by default
        by the batch's own number.
        """
        with_loss = target is not None and torch.is_grad_enabled()
        states = [] if with_loss and self.args.loop_loss != "none" else None
        h, losses = self._last_state(tokens_BT, cu_seqlens, with_loss, states)
        self.loop_metrics = {}
        if target is None:
            return self._logits(self.norm(h))
        return self._add_mixer_losses(self.loss_of(h, target, n_targets, states), losses)

    def loss_of(
        self,
        h: Tensor,
        target: Tensor,
        n_targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy of a residual stream, as `forward` does.

        `states` are the streams after each loop, for loop_loss.
        """
        self.loop_metrics = {}
        if states is not None:
            loss = self._loss_of_loops(states, target.flatten(), n_targets)
        else:
            loss = linear_cross_entropy(
                self.norm(h).flatten(0, 1),
                self.head_weight,
                target.flatten(),
                n_targets=n_targets,
                tp=tp_of(self.head),
            )
        if self.n_answers is not None:
            n_correct = self._count_correct(h, target, self.n_answers)
            total = max(self.n_answers, 1) if n_targets is None else n_targets
            self.loop_metrics["acc/out"] = n_correct / total
        return loss

    @torch.no_grad()
    def _count_correct(self, h: Tensor, target: Tensor, n_answers: int) -> Tensor:
        """Count the targets, `n_answers` of them, whose token has the largest logit; () in fp32."""
        target_N = target.flatten()
        # Sorting finds the answers without waiting for the GPU, as nonzero would.
        rows = (target_N != NO_TARGET).byte().argsort(descending=True)[:n_answers]
        found = self.logits_of(h.flatten(0, 1)[rows]).argmax(-1)
        return (found == target_N[rows]).sum().float()

    def _loss_of_loops(
        self, states: list[Tensor], target_N: Tensor, n_targets: Tensor | None
    ) -> Tensor:
        """Return the last loop's mean cross-entropy, with the gradients of loop_loss.

        `states` (B, T, D) are the stream after each loop. The loss counts in all of them. Those
        before the last loop_bptt loops have no gradient, so only head, norm and gate learn there.
        Loops before the last count a sample of the tokens, weighted up, so the mean stays the same.
        """
        n_loops, is_target = len(states), target_N != NO_TARGET
        if n_targets is None:
            n_targets = is_target.sum().clamp(min=1)
        # The norm runs again in the backward: its fp32 tensors would take 4 times a loop's state.
        run = partial(checkpoint, self._head_input, use_reentrant=False, preserve_rng_state=False)
        sample = slice(self.loop_loss_offset, None, self.args.loop_loss_every)
        normed, logits = zip(
            *(run(h, sample if t + 1 < n_loops else None) for t, h in enumerate(states)),
            strict=True,
        )
        # One call for all loops: full chunks, and each adds to the gradient of the head once.
        sizes, normed = [len(rows) for rows in normed], torch.cat(normed)
        entropy_N = None
        if self.exit_gate is not None:
            log_p = log_exit_distribution(logits[:-1], like=target_N)
            share_TN = log_p.exp()
            entropy_N = -(share_TN * log_p).sum(0)
        else:
            weights = loop_weights(self.args.loop_loss, n_loops)
            weights_T = constant(tuple(weights), target_N.device)
            share_TN = weights_T[:, None].expand(-1, len(target_N))
        scales = [float(self.args.loop_loss_every)] * (n_loops - 1) + [1.0]
        scale_T = constant(tuple(scales), target_N.device)
        weight_TN = share_TN * scale_T[:, None]
        loss, nats = weighted_linear_cross_entropy(
            normed,
            self.head_weight,
            torch.cat((target_N[sample].repeat(n_loops - 1), target_N)),
            torch.cat((weight_TN[:-1, sample].flatten(), weight_TN[-1])),
            n_targets=n_targets,
            tp=tp_of(self.head),
        )
        losses_T = scale_T * torch.stack([loop.sum() for loop in nats.split(sizes)]) / n_targets
        self.loop_metrics = {f"loss/loop/{t}": mean for t, mean in enumerate(losses_T)}
        if entropy_N is not None:
            entropy = (entropy_N * is_target).sum() / n_targets
            loss = loss - self.args.loop_entropy * entropy
            exits_T = (share_TN.detach() * is_target).sum(1) / n_targets
            self.loop_metrics |= {f"loops/exit/{t}": mean for t, mean in enumerate(exits_T)}
            self.loop_metrics["loops/exit_entropy"] = entropy.detach()
        self.loop_metrics["loss/objective"] = loss.detach()
        return losses_T[-1] + (loss - loss.detach())

    def _head_input(self, h: Tensor, sample: slice | None) -> tuple[Tensor, Tensor | None]:
        """Return the normed states (n, D) with a loss, and the logit (N,) of leaving after a loop.

        `sample` of the N tokens have a loss; in the last loop it is None, and all have one. The
        gate needs all tokens: p_T and the entropy of each depend on every loop.
        """
        if sample is None:
            return self.norm(h).flatten(0, 1), None
        h_ND, gate, norm = h.flatten(0, 1), self.exit_gate, self.norm
        logit = None
        if gate is not None:
            logit = exit_logit(h_ND, norm.weight, norm.eps, gate.weight, gate.bias)
        return norm(h_ND[sample]), logit

    @torch.no_grad()
    def hidden_states(self, tokens_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the input of the head, (B, T, D): logits are `hidden @ head_weight.T`.

        For callers that need the logits of a few tokens. With a vocabulary of 100,000, the logits
        of all tokens take more memory than the model.
        """
        return self.norm(self._last_state(tokens_BT, cu_seqlens)[0])

    @torch.no_grad()
    def loop_states(self, tokens_BT: Tensor) -> Tensor:
        """Return the residual stream before the first loop and after each, (loops + 1, B, T, D)."""
        states = [self.tok_embeddings(tokens_BT)]
        self._last_state(tokens_BT, None, states=states)
        return torch.stack(states)

    def logits_of(self, h: Tensor) -> Tensor:
        """Return the logits, in fp32, of a residual stream (..., D): final norm and head."""
        return self._logits(self.norm(h))

    def _last_state(
        self,
        tokens_BT: Tensor,
        cu_seqlens: Tensor | None,
        with_loss: bool = False,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Losses]:
        """Return the stream after the last loop, and the mixers' own losses.

        Appends the stream after each loop to `states`.
        """
        if cu_seqlens is not None and not torch.compiler.is_compiling():
            # Compiled blocks serve any number of documents.
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        h, losses = self._run_loops(
            tokens_BT,
            lambda block, h, spec: block(
                h, spec, cu_seqlens, with_loss and torch.is_grad_enabled()
            ),
            self.layout,
            states=states,
        )
        return h, losses

    def _run_loops(
        self,
        tokens: Tensor,
        run_layer: RunLayer,
        *grids: Sequence[Sequence[Any]],
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Losses]:
        """Embed `tokens` and run every (loop, layer); return h and the mixers' own losses.

        run_layer gets the entry [loop][layer] of each of `grids`; the first is the layout. Appends
        h after each loop to `states`.
        """
        loops = list(enumerate(zip(*grids, strict=True)))
        first = len(loops) - self.n_backward_loops(len(loops)) if torch.is_grad_enabled() else 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and first == 0):
            h, losses = self.tok_embeddings(tokens), []
            for t, rows in loops[:first]:
                h, _ = self.run_loop(h, t, run_layer, rows)
                if states is not None:
                    states.append(h)
        if first:
            # A leaf with a gradient: FSDP's hooks and compiled blocks see what they always see.
            h = h.detach().requires_grad_()
        for t, rows in loops[first:]:
            if self.checkpoint_loops and torch.is_grad_enabled():
                run = partial(checkpoint, self.run_loop, use_reentrant=False)
            else:
                run = self.run_loop
            h, new_losses = run(h, t, run_layer, rows)
            losses += new_losses
            if t == first and h.requires_grad:
                h.register_hook(self._enter_last_backward)
            if states is not None:
                states.append(h)
        return h, losses

    def n_backward_loops(self, n_loops: int) -> int:
        """Return through how many of `n_loops` loops the backward goes."""
        return min(n_loops, self.args.loop_bptt or n_loops)

    def run_loop(
        self, h: Tensor, t: int, run_layer: RunLayer, rows: tuple[Sequence[Any], ...]
    ) -> tuple[Tensor, Losses]:
        """Run the stack once, with the residual gate."""
        u, losses = h, []
        for block, spec, *memory in zip(self.layers, *rows, strict=True):
            h, loss = run_layer(block, h, spec, *memory)
            if loss is not None and (own_loss := MIXERS[spec.mixer].own_loss):
                losses.append((own_loss.name, loss))
        if self.rho is not None:
            gate = self.rho[min(t, len(self.rho) - 1)]  # further loops reuse the last one
            h = (h.float() + gate.float() * u.float()).type_as(h)
        return h, losses

    def _add_mixer_losses(self, loss: Tensor, losses: Losses) -> Tensor:
        """Add the gradients of the mixers' own losses to `loss`; its value doesn't change."""
        self.mixer_losses = {}
        for name in dict.fromkeys(name for name, _ in losses):
            mean = torch.stack([own for other, own in losses if other == name]).mean()
            self.mixer_losses[name] = mean.detach()
            loss = loss + (mean - mean.detach())
        return loss

    def _enter_last_backward(self, grad: Tensor) -> None:
        if self.before_last_backward is not None:
            self.before_last_backward()

    def begin_step(self, step: int | None, n_steps: int = 1) -> None:
        """Set what depends on the step: `step` of `n_steps` are done, None is inference.

        Draws T and random layouts, from the model's seed and `step` alone. Loop t always runs
        segment t of the pattern. Inference runs `loop_count` loops, or as many as `set_loops` says.
        """
        self.layout = self.inference_layout
        self.loop_loss_offset = (step or 0) % self.args.loop_loss_every
        if step is not None:
            self.layout = self.layout_plan.draw(step)[: self.loop_plan.draw(step, n_steps)]
        for mixer in self._mixers():
            mixer.begin_step(step)

    def computation(self) -> Hashable:
        """Return what `begin_step` has set: steps with equal values launch the same kernels."""
        phases = tuple(mixer.phase for mixer in self._mixers())
        return self.layout, self.loop_loss_offset, phases

    def set_loops(self, loop_count: int) -> None:
        """Run this many loops in evaluation and inference, in place. Weights don't change.

        Loops without a gate reuse the last one. UserError if the pattern has too few segments.
        """
        self.layout = self.inference_layout = self.args.layout_of(loop_count)

    @property
    def n_loops(self) -> int:
        """T of the current step."""
        return len(self.layout)

    @torch.no_grad()
    def extend_gates(self, n_trained: int) -> None:
        """Set the gates of loops that no step has run to the last trained gate, in place."""
        if self.rho is not None and 0 < n_trained < len(self.rho):
            self.rho[n_trained:] = self.rho[n_trained - 1]

    def own_loss_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the weights that only a mixer's own loss trains, by the name of the loss."""
        weights: dict[str, list[nn.Parameter]] = {}
        for mixer in self._mixers():
            if mixer.own_loss is not None:
                module = mixer.get_submodule(mixer.own_loss.module)
                weights.setdefault(mixer.own_loss.name, []).extend(module.parameters())
        return weights

    @property
    def head(self) -> nn.Embedding | nn.Linear:
        """The module whose weight computes the logits."""
        return self.tok_embeddings if self.args.weight_tying else self.output

    @property
    def head_weight(self) -> Tensor:
        """(V, D); under tensor parallelism the rows of this rank's tokens."""
        return local_weight(self.head)

    def init_cache(
        self, batch_size: int, max_seqlen: int, *, dtype: torch.dtype | None = None
    ) -> ModelCache:
        """Allocate an empty cache of `batch_size` rows, by default in the embedding's dtype."""
        weight = self.tok_embeddings.weight
        like = torch.empty(0, device=weight.device, dtype=dtype or weight.dtype)
        mixers = [
            [
                block.mixer(spec).init_cache(batch_size, max_seqlen, like, spec.window)
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
        """Extend cached sequences by prompts, in place; return logits (B, T, V) in fp32.

        rows (n,) is the cache row of each sequence, or of each packed document; row i for sequence
        i if None. The host needs the numbers of `rows` and `cu_seqlens`: lists of rows and
        `upload_cu_seqlens` avoid a sync.
        last_only: return (n, 1, V), the logits of each sequence's last position.
        """
        lengths = packed_lengths(tokens_BT, cu_seqlens)
        assert not last_only or min(lengths) > 0, f"no last position in sequences of {lengths}"
        numbers = range(len(lengths)) if rows is None else rows
        numbers = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        past = cache.extend(numbers, lengths)
        index = None if rows is None else upload(numbers, tokens_BT.device, torch.int64)
        prompts = Prompts(cu_seqlens, index, past)
        h, _ = self._run_loops(
            tokens_BT,
            lambda block, h, spec, memory: (block.prefill(h, spec, memory, prompts), None),
            *(self.inference_layout, cache.mixers),
        )
        if last_only:
            h = h[:, -1:] if cu_seqlens is None else h[0, cu_seqlens[1:].long() - 1][:, None]
        return self._logits(self.norm(h))

    @torch.no_grad()
    def step(self, tokens_B1: Tensor, cache: ModelCache) -> Tensor:
        """Extend every row of the cache by one token, in place; return logits (B, 1, V) in fp32."""
        cache.extend(range(cache.batch_size), [1] * cache.batch_size)
        h, _ = self._run_loops(
            tokens_B1,
            lambda block, h, spec, memory: (block.step(h, spec, memory), None),
            *(self.inference_layout, cache.mixers),
        )
        return self._logits(self.norm(h))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize every parameter from torch's global generator, by one rule for all mixers."""
        args = self.args
        init_stack(args, self.tok_embeddings, self._blocks())
        self.norm.reset_parameters()
        if not args.weight_tying:
            init_linear(self.output, args.init_base_std)
        if self.rho is not None:
            nn.init.zeros_(self.rho)
        if self.exit_gate is not None:
            self.exit_gate.reset_parameters()

    def _blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def _mixers(self) -> list[Mixer]:
        return [mixer for block in self._blocks() for mixer in block.mixers()]

    def _logits(self, h: Tensor) -> Tensor:
        tp = tp_of(self.head)
        return tp.gather_from(F.linear(tp.copy_to(h), self.head_weight)).float()


# Names of Lingua's apps.main.transformer.
LMTransformer, LMTransformerArgs = LoopedTransformer, LoopedTransformerArgs


def __getattr__(name: str) -> Any:
    """Find Lingua's other names in apps.LT2.parallel, which imports this module."""
    if name in ("build_fsdp_grouping_plan", "get_no_recompute_ops", "tp_parallelize"):
        return getattr(importlib.import_module("apps.LT2.parallel"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@torch.no_grad()
def init_stack(
    args: LoopedTransformerArgs, embedding: nn.Embedding, blocks: Sequence[Block]
) -> None:
    """Initialize the embedding and the blocks, in place."""
    std = args.init_base_std if args.init_base_std is not None else args.dim**-0.5
    trunc_normal_(embedding.weight, std)
    for i, block in enumerate(blocks):
        factor = depth_factor(
            args.init_std_factor,
            dim=args.dim,
            layer=i,
            n_layers=args.n_layers,
            loop_count=args.loop_count,
        )
        block.init_weights(args.init_base_std, factor)


def build_on_meta(args: LoopedTransformerArgs) -> LoopedTransformer:
    """Build the model without memory. UserError for impossible shapes, patterns and backends."""
    with torch.device("meta"):
        return LoopedTransformer(args)


def fit_loop_gates(rho_TD: Tensor, loop_count: int) -> Tensor:
    """Return gates for a loop count other than the trained one: extra loops reuse the last row."""
    n_trained = rho_TD.shape[0]
    if n_trained == loop_count:
        return rho_TD
    log_on_rank_0(
        "model.loop_count=%d on weights trained with %d loops: %s",
        loop_count,
        n_trained,
        "extra loops reuse the last residual gate"
        if loop_count > n_trained
        else "the gates of the last loops are not used",
        level=logging.WARNING,
    )
    extra = rho_TD[-1:].expand(max(loop_count - n_trained, 0), -1)
    return torch.cat((rho_TD[:loop_count], extra))
