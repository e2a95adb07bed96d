"""A looped transformer as transformers' LT2ForCausalLM: configuration, cache and model.

Needs transformers 5 or newer. `bundle.py` makes the modelling file of exported folders from this
module and those that it imports.

A batch with padding is packed: its tokens are concatenated into one row of documents, so padding
reaches no mixer and a padded batch equals its single sequences. Shapes: B sequences, T tokens,
N tokens of a batch without padding, D model dim, V tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.logging import get_logger

from apps.LT2.block import Block
from apps.LT2.huggingface.config import args_of, derived_entries
from apps.LT2.kernel.documents import upload, upload_cu_seqlens
from apps.LT2.loop_loss import ExitGate
from apps.LT2.mixers import MIXERS, Mixer, MixerCache, Prompts
from apps.LT2.mixers.base import Extension
from apps.LT2.mixers.parts import ShortConv
from apps.LT2.pattern import LayerSpec, Layout
from apps.LT2.transformer import LoopedTransformerArgs, init_stack
from lingua.transformer import RMSNorm, init_linear, trunc_normal_

logger = get_logger(__name__)

SLOTS = 128  # a cache without a known length grows by multiples of this many tokens


class LT2Config(PreTrainedConfig):
    """Options of a looped transformer.

    model        options of LT2's `model:` section
    loop_count   how often the stack runs
    loop_gates   rows of the residual gate, the loops of training; extra loops use the last row
    """

    model_type = "lt2"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        vocab_size: int = 32000,
        loop_count: int = 1,
        loop_gates: int | None = None,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.model = dict(model or {})
        self.vocab_size, self.loop_count, self.use_cache = vocab_size, loop_count, use_cache
        self.loop_gates = loop_count if loop_gates is None else loop_gates
        for name in derived_entries(LoopedTransformerArgs()):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id = pad_token_id

    def args(self, loop_count: int | None = None) -> LoopedTransformerArgs:
        """Return the model's options, with another number of loops if it is given."""
        loop_count = self.loop_count if loop_count is None else loop_count
        if not isinstance(loop_count, int) or loop_count < 1:
            raise ValueError(f"loop_count={loop_count!r} must be an integer of at least 1")
        args = args_of({**vars(self), "loop_count": loop_count})
        return replace(args, attn_impl="naive") if self._attn_implementation == "eager" else args

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **derived_entries(self.args())}

    @property
    def hidden_size(self) -> int:
        return self.args().dim

    @property
    def num_hidden_layers(self) -> int:
        return self.args().n_layers

    @property
    def num_attention_heads(self) -> int:
        return derived_entries(self.args())["num_attention_heads"]

    @property
    def max_position_embeddings(self) -> int:
        return self.args().max_seqlen

    @property
    def layout(self) -> list[list[str]]:
        return derived_entries(self.args())["layout"]


# ---- cache


class LT2CacheEntry:
    """The past of one (loop, layer)."""

    is_compileable = is_sliding = supports_early_init = False

    def __init__(self) -> None:
        self.memory: MixerCache | None = None
        self.name = ""  # such as "loop 0, layer 3 (gdn)"

    @property
    def is_initialized(self) -> bool:
        return self.memory is not None

    def reserve(
        self, mixer: Mixer, spec: LayerSpec, h: Tensor, n_rows: int, n_tokens: int
    ) -> MixerCache:
        """Return the memory, enlarged to `n_tokens` slots where the mixer has slots."""
        if self.memory is None or self.n_tokens < n_tokens:
            memory = mixer.init_cache(n_rows, n_tokens, h.detach().new_empty(0), spec.window)
            if self.memory is not None:
                memory.copy_prefix(self.memory)
            self.memory, self.n_tokens = memory, n_tokens
        assert self.memory is not None
        return self.memory

    def select(self, rows: Tensor) -> None:
        """Replace the rows by copies of `rows`, (n,) int64."""
        if self.memory is not None:
            rows = rows.to(self.memory.device)
            self.memory = self.memory.map(lambda tensor: tensor.index_select(0, rows))

    def detach(self) -> None:
        if self.memory is not None:
            self.memory = self.memory.map(torch.Tensor.detach)


class LT2Cache(Cache):
    """What a model keeps of its past: one entry per (loop, layer), in the order in which they run.

    Padding takes no place in it. `max_length` is a hint that saves copies as the cache grows.
    """

    def __init__(self, max_length: int = 0):
        super().__init__(layers=[])
        self.loop_count = 0  # 0: no token seen
        self.capacity, self.max_length = 0, max_length
        self.n_seen = 0  # columns of the attention mask
        self.seen: Tensor | None = None  # (B, n_seen) bool, False for padding; None: no padding
        self.lengths: list[int] = []  # tokens of each row

    def begin(self, loop_count: int, n_layers: int, n_rows: int) -> None:
        """Allocate the entries at the first call, and check later calls against it."""
        if not self.layers:
            self.loop_count, self.lengths = loop_count, [0] * n_rows
            self.layers = [LT2CacheEntry() for _ in range(loop_count * n_layers)]
        if self.loop_count != loop_count:
            raise ValueError(
                f"loop_count={loop_count}, but past_key_values was filled with {self.loop_count} "
                "loops; start with an empty cache"
            )
        if len(self.lengths) != n_rows:
            raise ValueError(
                f"a batch of {n_rows} sequences doesn't fit past_key_values of {len(self.lengths)}"
            )

    def extend(self, kept: Tensor | None, n_columns: int, n_tokens: Sequence[int]) -> None:
        """Count new columns, of which `kept` (B, n_columns) hold the `n_tokens` of each row."""
        if kept is not None or self.seen is not None:
            shape = (len(self.lengths), self.n_seen)
            device = (kept if kept is not None else self.seen).device  # pyright: ignore
            seen = torch.ones(shape, dtype=torch.bool, device=device)
            if self.seen is not None:
                seen = self.seen
            if kept is None:
                kept = seen.new_ones(len(self.lengths), n_columns)
            self.seen = torch.cat((seen, kept.to(seen.device)), dim=1)
        self.n_seen += n_columns
        self.lengths = [a + b for a, b in zip(self.lengths, n_tokens, strict=True)]
        needed = max(self.lengths)
        if needed > self.capacity:
            grown = max(needed, 3 * self.capacity // 2)
            self.capacity = max(-(-grown // SLOTS) * SLOTS, self.max_length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        n_new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.n_seen + n_new, 0

    @property
    def is_croppable(self) -> bool:
        return all(entry.memory is None or entry.memory.can_crop(0) for entry in self.layers)

    def activate_past_recording(self) -> None:
        pass

    def reset(self) -> None:
        self.__init__(self.max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.lengths)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for entry in self.layers:
            entry.select(indices)
        self.lengths = [self.lengths[row] for row in indices.tolist()] if self.lengths else []
        if self.seen is not None:
            self.seen = self.seen[indices.to(self.seen.device)]

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens, or remove the last -max_length ones.

        ValueError, and no change, if a layer's past is a state that sums over all tokens, or a
        sliding window that has dropped tokens.
        """
        n_kept = max_length if max_length > 0 else self.n_seen + max_length
        if n_kept >= self.n_seen:
            return
        if n_kept < 0:
            raise ValueError(f"crop({max_length}) of a cache of {self.n_seen} tokens")
        longest = max(self.lengths)
        memories = [entry.memory for entry in self.layers if entry.memory is not None]
        for entry in self.layers:
            if entry.memory is not None and not entry.memory.can_crop(longest):
                raise ValueError(
                    f"the cache of {entry.name} can't be cropped: it doesn't keep what it had "
                    "before the last tokens; copy the cache before these tokens, or run them again"
                )
        if self.seen is None:
            self.lengths = [n_kept] * len(self.lengths)
        else:
            self.seen = self.seen[:, :n_kept]
            self.lengths = self.seen.sum(1).tolist()
        for memory in memories:
            memory.crop(upload(self.lengths, memory.device, torch.int64))
        self.n_seen = n_kept


# ---- inputs


@dataclass
class Packing:
    """How tokens without padding are concatenated into one row, and put back."""

    index_N: Tensor  # int64, their places in the flattened batch
    shape: tuple[int, int]  # of the batch
    lengths: list[int]  # of each sequence that has tokens
    rows: list[int]  # which of the batch they are

    def pack(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.flatten(0, 1)[self.index_N][None]

    def unpack(self, x_1ND: Tensor) -> Tensor:
        """Return (B, T, D), zeros at padding."""
        B, T = self.shape
        flat = x_1ND.new_zeros(B * T, x_1ND.shape[-1])
        return flat.index_copy(0, self.index_N.to(flat.device), x_1ND[0]).view(B, T, -1)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        return upload_cu_seqlens(list(itertools.accumulate(self.lengths, initial=0)), device)


def pack_kept(kept_BT: Tensor) -> tuple[Packing | None, list[int]]:
    """Return how to pack the kept tokens, None if all are kept, and the number in each row."""
    lengths = kept_BT.sum(1).tolist()
    B, T = kept_BT.shape
    if min(lengths) == T:
        return None, lengths
    if not any(lengths):
        raise ValueError("attention_mask is zero for all tokens")
    index_N = kept_BT.flatten().nonzero()[:, 0]
    rows = [row for row, n in enumerate(lengths) if n]
    return Packing(index_N, (B, T), [lengths[row] for row in rows], rows), lengths


def pack_positions(
    position_ids: Tensor, past: Sequence[int], kept: Tensor | None
) -> Packing | None:
    """Return the documents of `position_ids` (B, T), None for one document per row.

    A row of several documents must be the only one, as DataCollatorWithFlattening makes it.
    """
    B, T = position_ids.shape
    kept = torch.ones_like(position_ids, dtype=torch.bool) if kept is None else kept
    start = torch.tensor(past, device=position_ids.device)[:, None]
    expected = kept.long().cumsum(1) - 1 + start
    if bool((position_ids == expected)[kept].all()):
        return None
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    lengths = [b - a for a, b in itertools.pairwise([*starts, T])]
    counted = list(itertools.chain(*map(range, lengths)))
    if B > 1 or any(past) or not bool(kept.all()) or position_ids[0].tolist() != counted:
        raise ValueError(
            "position_ids must count the tokens of each sequence, or of each document of one "
            "packed row, from 0; positions that skip are not supported"
        )
    return Packing(torch.arange(T, device=position_ids.device), (1, T), lengths, [0])


# ---- model


class LT2Block(GradientCheckpointingLayer, Block):
    """A layer that all loops share. Without an `entry` it runs whole sequences."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        h: Tensor,
        spec: LayerSpec,
        cu_seqlens: Tensor | None = None,
        with_loss: bool = False,
        entry: LT2CacheEntry | None = None,
        prompts: Prompts | None = None,
        n_rows: int = 0,
        n_tokens: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return h and the mixer's own loss, if asked for.

        entry      the past to extend, in place, of `n_rows` rows and `n_tokens` slots or more
        prompts    the sequences that extend it; None: one token for each row
        """
        if entry is None:
            return Block.forward(self, h, spec, cu_seqlens, with_loss)
        mixer = self.mixer(spec)
        memory = entry.reserve(mixer, spec, h, n_rows, n_tokens)
        with onloaded(mixer):
            if prompts is None:
                return self.step(h, spec, memory), None
            return self.prefill(h, spec, memory, prompts), None


@contextmanager
def onloaded(mixer: Mixer) -> Iterator[None]:
    """Load a mixer's offloaded weights. accelerate does so in `forward` only."""
    parts = [mixer, *(child for child in mixer.children() if isinstance(child, ShortConv))]
    hooks = [(part._hf_hook, part) for part in parts if hasattr(part, "_hf_hook")]
    for hook, part in hooks:
        hook.pre_forward(part)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        for hook, part in hooks:
            hook.post_forward(part, None)  # pyright: ignore[reportCallIssue]


@dataclass
class LT2ModelOutput(BaseModelOutputWithPast):
    """`own_loss` is the sum of the mixers' own losses, a scalar, if they were asked for."""

    own_loss: Tensor | None = None


class LT2PreTrainedModel(PreTrainedModel):
    config_class = LT2Config
    config: LT2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LT2Block"]
    _supports_sdpa = True
    # Norms, gates, decays and convolutions stay in fp32, as in training.
    _keep_in_fp32_modules_strict = ["norm", "conv", "rho", "exit_gate", "A_log", "bias", "mamba2.D"]

    def init_own_weights(self) -> None:
        """Initialize all weights, in place, as `LoopedTransformer.init_weights` does."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize weights that no file had, all of this model's at once.

        A layer's range depends on its depth, so a module alone can't be initialized.
        """
        own = set(self.parameters())
        if isinstance(module, nn.Embedding | nn.Linear) and module.weight not in own:
            trunc_normal_(module.weight, module.weight.shape[1] ** -0.5)  # a resized vocabulary
            return
        loaded = {param for param in own if getattr(param, "_is_hf_initialized", False)}
        if loaded == own:
            return
        saved = {param: param.clone() for param in loaded}
        self.init_own_weights()
        for param in own:
            if param in saved:
                param.copy_(saved[param])
            param._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]


class LT2Model(LT2PreTrainedModel):
    """The looped stack without a head."""

    def __init__(self, config: LT2Config):
        super().__init__(config)
        args = config.args()
        self.tok_embeddings = nn.Embedding(config.vocab_size, args.dim)
        columns = zip(*args.layout(), strict=True)
        self.layers = nn.ModuleList(LT2Block(args, column) for column in columns)
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.rho = (
            nn.Parameter(torch.empty(config.loop_gates, args.dim)) if args.use_residual else None
        )
        # Kept for exits; all loops run.
        self.exit_gate = ExitGate(args.dim) if args.loop_loss == "gate" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = value

    def init_own_weights(self) -> None:
        init_stack(self.config.args(), self.tok_embeddings, list(self.layers))  # pyright: ignore
        self.norm.reset_parameters()
        if self.rho is not None:
            self.rho.zero_()
        if self.exit_gate is not None:
            self.exit_gate.reset_parameters()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LT2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        loop_count: int | None = None,
        with_loss: bool = False,
        **kwargs: Any,
    ) -> LT2ModelOutput:
        """Run the loops.

        attention_mask   (B, past + T), 0 for padding on either side
        loop_count       another number of loops than the configuration's
        with_loss        return the mixers' own losses, for training
        position_ids     (1, T): each 0 starts a document; documents don't see each other
        hidden_states are the embeddings and the output of each (loop, layer), the last normalized.
        """
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("output_attentions=True is not supported: most mixers have no weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        h = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        layout = self._layout(loop_count)
        cache = self._cache(past_key_values, use_cache, with_loss)
        B, T = h.shape[:2]
        if T == 0:
            raise ValueError("the input has no tokens; give each text one, such as BOS")
        n_past = 0
        if cache is not None:
            cache.begin(len(layout), len(self.layers), B)
            n_past = cache.n_seen
        kept = self._kept(attention_mask, B, T, n_past)
        packing, lengths = (None, [T] * B) if kept is None else pack_kept(kept)
        if (position_ids := kwargs.get("position_ids")) is not None:
            past = [0] * B if cache is None else cache.lengths
            documents = pack_positions(position_ids.expand(B, T), past, kept)
            if documents is not None and cache is not None:
                if past_key_values is not None or use_cache:
                    raise ValueError("a cache doesn't support several documents in one row")
                cache = None
            packing = documents or packing
        if cache is None:
            outputs = self._run(h, layout, packing, with_loss)
        else:
            held = cache.lengths
            cache.extend(None if packing is None else kept, T, lengths)
            # Gradients don't reach the past, so no caller should get some of them.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not n_past):
                outputs = self._run(h, layout, packing, with_loss, cache, held)
        h, states, own_loss = outputs
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return LT2ModelOutput(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=states if output_hidden_states else None,
            own_loss=own_loss,
        )

    def _run(
        self,
        h: Tensor,
        layout: Layout,
        packing: Packing | None,
        with_loss: bool,
        cache: LT2Cache | None = None,
        held: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Run every (loop, layer) on h (B, T, D).

        Returns the normalized output, all hidden states, and the sum of the mixers' own losses.
        """
        cu_seqlens, entries = None, None
        options: dict[str, Any] = {}
        if packing is not None:
            cu_seqlens = packing.cu_seqlens(h.device)
        if cache is not None:
            n_rows, T = h.shape[:2]
            entries = iter(cache.layers)
            options = {"n_rows": n_rows, "n_tokens": cache.capacity}
            if T > 1 or not any(held) or packing is not None:
                options["prompts"] = self._prompts(packing, cu_seqlens, held, h)
        else:
            options = {"cu_seqlens": cu_seqlens, "with_loss": with_loss}
        if packing is not None:
            h = packing.pack(h)
        restore = (lambda x: x) if packing is None else packing.unpack
        states, losses = [restore(h)], []
        for t, loop in enumerate(layout):
            u = h
            for i, (block, spec) in enumerate(zip(self.layers, loop, strict=True)):
                if entries is not None:
                    options["entry"] = entry = next(entries)
                    entry.name = f"loop {t}, layer {i} ({spec})"
                h, loss = block(h, spec, **options)
                if loss is not None:
                    losses.append((MIXERS[spec.mixer].module_name, loss))
                if i + 1 < len(loop):
                    states.append(restore(h))
            if self.rho is not None:
                rho = self.rho[min(t, len(self.rho) - 1)].to(h.device)
                h = (h.float() + rho.float() * u.to(h.device).float()).type_as(h)
            if t + 1 < len(layout):
                states.append(restore(h))
        if cache is not None and h.requires_grad:
            for entry in cache.layers:
                entry.detach()
        own_loss = None
        for name in dict.fromkeys(name for name, _ in losses):
            mean = torch.stack([loss for other, loss in losses if other == name]).mean()
            own_loss = mean if own_loss is None else own_loss + mean
        h = restore(self.norm(h))
        return h, (*states, h), own_loss

    def _prompts(
        self, packing: Packing | None, cu_seqlens: Tensor | None, held: Sequence[int], h: Tensor
    ) -> Prompts:
        rows, lengths = (range(len(h)), [h.shape[1]] * len(h))
        if packing is not None:
            rows, lengths = packing.rows, packing.lengths
        past = tuple(Extension(r, held[r], n) for r, n in zip(rows, lengths, strict=True))
        index = upload(list(rows), h.device, torch.int64)
        return Prompts(cu_seqlens, index, past if any(e.held for e in past) else ())

    def _layout(self, loop_count: int | None) -> Layout:
        """Return what each (loop, layer) runs. ValueError if the pattern has other loops."""
        loop_count = self.config.loop_count if loop_count is None else loop_count
        known = self.__dict__.setdefault("_layouts", {})
        if loop_count not in known:
            known[loop_count] = self.config.args(loop_count).layout()
        return known[loop_count]

    def _cache(
        self, past: LT2Cache | None, use_cache: bool | None, with_loss: bool
    ) -> LT2Cache | None:
        """Return the cache to fill, if any. Training needs none."""
        if past is not None and not isinstance(past, LT2Cache):
            raise ValueError(
                f"past_key_values must be an LT2Cache, not a {type(past).__name__}; leave it out, "
                "and the model returns one"
            )
        if past is not None and not self.training:
            return past
        if self.training:
            if use_cache or past is not None:
                logger.warning_once("use_cache=True has no effect in training mode")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not with_loss
        return LT2Cache() if use_cache else None

    def _kept(self, mask: Tensor | None, B: int, T: int, n_past: int) -> Tensor | None:
        """Return which new tokens are not padding, (B, T) bool, or None for all."""
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] not in (T, n_past + T):
            raise ValueError(
                f"attention_mask must be ({B}, {n_past + T}), 0 for padding, and is "
                f"{tuple(mask.shape)}"
            )
        return mask[:, -T:].bool()


class LT2ForCausalLM(LT2PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: LT2Config):
        super().__init__(config)
        self.model = LT2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Assisted generation needs a cache that can be cropped.
        specs = {spec for loop in config.args().layout() for spec in loop}
        self._is_stateful = any(
            spec.window is not None or not MIXERS[spec.mixer].keeps_tokens for spec in specs
        )
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def init_own_weights(self) -> None:
        self.model.init_own_weights()
        if not self.config.tie_word_embeddings:
            init_linear(self.lm_head, self.config.args().init_base_std)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LT2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loop_count: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return fp32 logits (B, T, V), and with `labels` (B, T) the loss.

        labels           tokens to predict, -100 to ignore one; the model shifts them
        logits_to_keep   logits of the last n tokens only, or of these positions; 0 for all
        loop_count       another number of loops than the configuration's
        LT2Model.forward describes the other arguments.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            loop_count=loop_count,
            with_loss=labels is not None and torch.is_grad_enabled(),
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if outputs.own_loss is not None:  # it adds gradients; the value is cross-entropy
                loss = loss + (outputs.own_loss - outputs.own_loss.detach())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r} is not supported; leave it out"
            )
        past, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        # Newer transformers drop a mask without padding.
        n_input = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        if isinstance(past, LT2Cache) and 0 <= n_input <= past.n_seen > 0:
            raise ValueError(
                f"past_key_values holds {past.n_seen} tokens and the input {n_input}; give "
                "generate the whole text: these tokens and at least one new one"
            )
        if past is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LT2Cache(max_length=args[-1])
