"""Run LT2 models in the LM-Evaluation-Harness, where they are registered as `lt2`.

Every rank gets all requests, computes its share of the batches and returns all answers, so each
rank looks like a single process to the harness. (The harness's own data parallelism pads the ranks'
lists with duplicates, and fails with fewer documents than ranks.) Texts are tokenized as the
harness does for other causal models, so that scores are comparable. This module imports without the
package lm_eval, but its classes don't work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from apps.LT2.evaluation.args import check_stride
from apps.LT2.evaluation.chat import ChatTemplate, find_chat_template
from apps.LT2.evaluation.scoring import map_on_ranks, score_continuations
from apps.LT2.exits import check_exit
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import LoadedModel, load_model_and_tokenizer, resolve_device
from lingua.args import dataclass_from_dict
from lingua.config.help import format_value
from lingua.distributed import get_is_master, get_world_size, setup_torch_distributed
from lingua.errors import UserError, import_optional
from lingua.parallel.args import DistributedArgs
from lingua.tokenizer import TokenizerArgs

if TYPE_CHECKING:
    LM: Any = object
    register_model: Any = None
else:
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError:
        LM = object

        def register_model(name):
            return lambda cls: cls


Tokens = list[int]

DEFAULT_DEVICE = "cuda:0"  # of the harness's command line

# A task's names for the maximum answer length, in the harness's order.
MAX_GEN_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class EvalHarnessLM(LM):
    def __init__(
        self,
        loaded: LoadedModel,
        cfg: PackedCausalTransformerGeneratorArgs,
        *,
        stride: int | None = None,
        tokenizer_path: str | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        """`cfg` sets the batch size (max_tokens), the window (max_prompt_len; null = the training
        sequence length), and the generation settings that a task doesn't set."""
        import_optional("lm_eval", extra="eval", needed_by="the LM-Evaluation-Harness")
        super().__init__()
        self.model, self._tokenizer, config = loaded
        self.cfg, self.stride, self.should_stop = cfg, stride, should_stop
        self.max_len = cfg.max_prompt_len or self.model.args.max_seqlen
        check_stride(stride, self.max_len)
        self._device = self.model.tok_embeddings.weight.device
        data = config["data"]
        self.add_bos = data.get("add_bos", True) and self._tokenizer.bos_id >= 0
        self.add_eos = data.get("add_eos", True) and self._tokenizer.eos_id >= 0
        saved = dataclass_from_dict(TokenizerArgs, data["tokenizer"])
        self._tokenizer_args = replace(saved, path=tokenizer_path or saved.path)

    # ---- the interface of the harness

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        if empty := next((r for r in requests if r.args[1] == ""), None):
            raise UserError(
                f"harness.tasks: {empty.task_name}: a choice of question {empty.doc_id} is empty, "
                "so it has no probability; correct the task"
            )
        pairs = [self.encode_pair(*request.args) for request in requests]
        return self._score(pairs, "loglikelihood")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        pairs = [([self._first_token()], self._encode(request.args[0])) for request in requests]
        scores = self._score(pairs, "loglikelihood_rolling", stride=self.stride)
        return [loglikelihood for loglikelihood, _ in scores]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate an answer to each request; requests with the same settings share batches.

        A sample depends on the seed and on its index in the list, not on the number of ranks.
        """
        prompts: list[Tokens] = []
        groups: dict[str, tuple[PackedCausalTransformerGeneratorArgs, list[int]]] = {}
        for i, request in enumerate(requests):
            context, settings = request.args
            cfg = generation_settings(settings, self.cfg)
            prompts.append(self._cut_prompt(context, cfg.max_gen_len))
            groups.setdefault(repr(cfg), (cfg, []))[1].append(i)
        batches = [
            (cfg, batch)
            for cfg, indices in groups.values()
            for batch in batch_by_length(indices, prompts, cfg)
        ]

        def answer(batch: tuple[PackedCausalTransformerGeneratorArgs, list[int]]) -> list[str]:
            cfg, indices = batch
            longest = max(len(prompts[i]) for i in indices) + cfg.max_gen_len
            cfg = replace(cfg, max_tokens=max(cfg.max_tokens, longest))
            generator = PackedCausalTransformerGenerator(cfg, self.model, self._tokenizer)
            done = generator.complete([prompts[i] for i in indices], places=indices, score=False)
            return [completion.text for completion in done]

        answers = map_on_ranks(
            batches, answer, should_stop=self.should_stop, progress=_progress("generate_until")
        )
        texts = {
            i: text
            for (_, indices), batch in zip(batches, answers, strict=True)
            for i, text in zip(indices, batch, strict=True)
        }
        return [texts[i] for i in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._chat_template.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._chat_template.text if chat_template else None

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return find_chat_template(self._tokenizer_args)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of the harness's prompt cache."""
        path = self._tokenizer_args.path or ""
        return f"{self._tokenizer_args.name}__{path}".replace("/", "__")

    def set_cache_hook(self, cache_hook: Any) -> None:
        if cache_hook.dbdict is not None and get_world_size() > 1:
            raise UserError(
                f"use_cache works with one process, not {get_world_size()}; start one, or leave it "
                "out"
            )
        super().set_cache_hook(cache_hook)

    # ---- tokens

    def encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """Return the tokens of both; the context has at least one token.

        Whitespace at the end of the context moves to the continuation, and both are encoded as one
        text, like the words of training. A token across the boundary goes to the continuation.
        """
        n_blanks = len(context) - len(context.rstrip())
        if n_blanks:
            context, continuation = context[:-n_blanks], context[-n_blanks:] + continuation
        before, whole = self._encode(context), self._encode(context + continuation)
        pairs = enumerate(zip(before, whole, strict=False))
        n_same = next((i for i, (a, b) in pairs if a != b), min(len(before), len(whole)))
        first = [self._first_token()] if self.add_bos or n_same == 0 else []
        return first + whole[:n_same], whole[n_same:]

    def _encode(self, text: str) -> Tokens:
        return self._tokenizer.encode(text, add_bos=False, add_eos=False)

    def _first_token(self) -> int:
        """Return the token before each document in training: BOS, or the previous EOS."""
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        choices = [(self.add_bos, bos), (self.add_eos, eos), (True, bos), (True, eos)]
        for is_used, token in choices:
            if is_used and token >= 0:
                return token
        raise UserError("the tokenizer has neither BOS nor EOS, so the first token has no context")

    def _cut_prompt(self, context: str, max_gen_len: int) -> Tokens:
        """Return the end of the prompt, so that the answer fits, or half of a training row."""
        if self.cfg.max_prompt_len is not None:
            room = self.cfg.max_prompt_len
        else:
            room = max(self.max_len - max_gen_len, self.max_len // 2, 1)
        tokens = self._encode(context)
        if self.add_bos or not tokens:
            tokens = [self._first_token(), *tokens]
        return tokens[-room:]

    def _score(
        self, pairs: list[tuple[Tokens, Tokens]], what: str, stride: int | None = None
    ) -> list[tuple[float, bool]]:
        return score_continuations(
            self.model,
            pairs,
            max_len=self.max_len,
            max_tokens=self.cfg.max_tokens,
            stride=stride,
            rule=check_exit(self.cfg.exit, self.model.args, len(self.model.inference_layout)),
            should_stop=self.should_stop,
            progress=_progress(what),
        )


def generation_settings(
    given: Mapping[str, Any], cfg: PackedCausalTransformerGeneratorArgs
) -> PackedCausalTransformerGeneratorArgs:
    """Merge a task's generation settings into `cfg`, with the harness's semantics.

    do_sample=false is greedy. A task that sets neither do_sample nor temperature follows `cfg`.
    UserError for a setting that is unknown or wrong.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(stop, str) for stop in until):
        raise UserError(f"generation_kwargs: until={format_value(until)} must be texts; quote them")
    lengths = [value for name in MAX_GEN_NAMES if (value := rest.pop(name, None)) is not None]
    max_gen_len = int(lengths[0]) if lengths else cfg.max_gen_len
    do_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if temperature is not None:
        replace(cfg, temperature=float(temperature))  # UserError for a bad value, used or not
    if do_sample is False:
        temperature = 0.0
    elif temperature is None:
        temperature = cfg.temperature or (1.0 if do_sample else 0.0)
    sampling = {name: rest.pop(name, getattr(cfg, name)) for name in ("top_p", "top_k")}
    if (top_k := sampling["top_k"]) is not None:
        if int(top_k) != top_k:
            raise UserError(f"generation_kwargs: top_k={top_k} must be a whole number")
        sampling["top_k"] = int(top_k)
    if rest.pop("num_beams", 1) != 1:
        rest["num_beams"] = given["num_beams"]
    if rest:
        shown = ", ".join(f"{name}={value}" for name, value in rest.items())
        raise UserError(
            f"generation_kwargs: {shown}: not supported; use until, {', '.join(MAX_GEN_NAMES)}, "
            "do_sample, temperature, top_p and top_k"
        )
    return replace(
        cfg,
        until=[stop for stop in until if stop],
        max_gen_len=max_gen_len,
        max_tokens=max(cfg.max_tokens, max_gen_len + 1),
        max_prompt_len=None,  # prompts are already truncated
        temperature=float(temperature),
        **sampling,
    )


def check_generation(lm: Any, tasks: Mapping[str, Any]) -> None:
    """Raise a UserError that names the task if its generation settings don't fit an lt2 model."""
    for name, task in tasks.items():
        settings = task.get_config("generation_kwargs")
        if isinstance(lm, EvalHarnessLM) and task.get_config("output_type") == "generate_until":
            try:
                generation_settings(settings or {}, lm.cfg)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None


def batch_by_length(
    indices: list[int], prompts: list[Tokens], cfg: PackedCausalTransformerGeneratorArgs
) -> Iterator[list[int]]:
    """Yield batches of indices into `prompts` that fit into the cache, longest prompts first.

    Every row of the cache has the length of the longest prompt and its answer. The rows of a batch
    have at most `cfg.max_tokens` slots in total.
    """
    batch: list[int] = []
    for i in sorted(indices, key=lambda i: -len(prompts[i])):
        if batch and (len(batch) + 1) * (len(prompts[batch[0]]) + cfg.max_gen_len) > cfg.max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _progress(what: str) -> Callable[[Sequence], Iterable]:
    tqdm = import_optional("tqdm", extra="eval", needed_by="the LM-Evaluation-Harness")
    return partial(tqdm.tqdm, desc=what, unit="batch", disable=not get_is_master())


# ---- the harness's own command line


@dataclass
class ModelArgs(PackedCausalTransformerGeneratorArgs):
    """Options of `--model_args` for the model `lt2`. The default of max_tokens on GPUs is 8192."""

    ckpt: str = ""  # a run's folder, a step folder or a file of weights; required
    loop_count: int | None = None  # number of loops; null = as in training
    tokenizer_path: str | None = None  # path of the tokenizer's file; null = as in training
    max_gen_len: int = 256  # maximum answer length if the task sets none
    stride: int | None = None  # tokens between rolling windows; null = the window's length


@register_model("lt2")
class RegisteredLM(EvalHarnessLM):
    """The model of `--model lt2`, built from ModelArgs."""

    def __init__(
        self, batch_size: int | str = 1, max_batch_size: int | None = None, **model_args: Any
    ):
        # The harness's command line passes 1 by default.
        if str(batch_size) not in ("1", "auto") or max_batch_size is not None:
            raise UserError(
                f"batch_size={batch_size}, max_batch_size={max_batch_size}: batches are limited by "
                "tokens; use --model_args max_tokens=8192"
            )
        model_args.pop("trust_remote_code", None)  # the command line may add it
        if resolve_device(model_args.get("device", "auto")).type == "cuda":
            # Only on GPUs: on a CPU the cost of a packed row is quadratic in its length.
            model_args.setdefault("max_tokens", 8192)
        args = dataclass_from_dict(ModelArgs, model_args)
        if not args.ckpt:
            raise UserError("ckpt is not set; use --model_args ckpt=runs/demo")
        setup_torch_distributed(DistributedArgs(model_dtype="fp32"))  # no group in one process
        loaded = load_model_and_tokenizer(
            args.ckpt,
            dtype=args.dtype,
            device=args.device,
            loop_count=args.loop_count,
            tokenizer_path=args.tokenizer_path,
            exit=args.exit,
        )
        super().__init__(loaded, args, stride=args.stride, tokenizer_path=args.tokenizer_path)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> RegisteredLM:
        """Build the model; `--model_args` overrides the other options of the command line."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        # The command line's default is the same without a GPU, and on every rank.
        if given.get("device") == DEFAULT_DEVICE:
            del given["device"]
        return cls(**given | arg_dict)
