"""Show what a model would predict after each loop: top tokens, distance to the last loop, updates.

    python -m apps.LT2.scripts.loop_lens ckpt=runs/demo prompt="Once upon a time" out=lens.png
    python -m apps.LT2.scripts.loop_lens runs/demo prompts='["In a", "The"]' positions=all

After each loop, the final norm and the head turn the hidden state into a distribution over tokens.

    KL        KL(last loop || this loop) in nats: 0 once the prediction has settled
    update    norm of what the loop adds to the hidden state, relative to the state before it

positions=last shows the prediction after the prompt, all the one after each token.
"""

from __future__ import annotations

import json
import logging
import statistics
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.inference.prompts import check_tokens
from apps.LT2.scripts.figure import COLOURS, FORMATS, import_pyplot, save_figure, set_plain_ticks
from apps.LT2.transformer import LoopedTransformer
from lingua.args import parse_args, print_text
from lingua.errors import UserError, run_cli
from lingua.files.lock import make_writable
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

WIDTH = 100  # columns of the table
MAX_PANEL = 24  # positions in a picture
AT_ONCE = 256  # positions whose logits are in memory
POSITIONS, OUTPUTS = ("last", "all"), ("table", "json")


@dataclass(kw_only=True)
class LensArgs:
    POSITIONAL: ClassVar = "ckpt"
    ALIASES: ClassVar = {"ckpt_dir": "ckpt", "dump_dir": "ckpt"}

    ckpt: str  # a run's dump_dir (newest checkpoint), a step folder, or a weight file
    prompt: str | None = None  # a text
    prompts: list[str] | None = None  # several texts, such as '["Once upon", "In a"]'
    positions: str = "last"  # last = after the prompt | all = after each of its tokens
    top_k: int = 5  # tokens shown for each loop
    loop_count: int | None = None  # number of loops; null = as in training
    out: str | None = None  # picture: .png, .svg or .pdf
    format: str = "table"  # table | json
    dtype: str = "auto"  # bf16, fp16 or fp32; auto: bf16 on a GPU, fp32 on a CPU
    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda if available
    tokenizer_path: str | None = None  # path of the tokenizer file; null = as in training

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.prompts):
            raise UserError("set prompt='a text', or prompts='[\"one\", \"two\"]' for several")
        for name, choices in (("positions", POSITIONS), ("format", OUTPUTS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)} must be one of {', '.join(choices)}")
        if not 1 <= self.top_k <= 20:
            raise UserError(f"top_k={self.top_k} must be from 1 to 20")
        if self.out is not None and Path(self.out).suffix not in FORMATS:
            raise UserError(f"out={self.out} must end in {', '.join(FORMATS)}")

    def texts(self) -> list[str]:
        return self.prompts or [str(self.prompt)]


@dataclass(frozen=True)
class Seen:
    """What one loop shows at one position."""

    top: list[tuple[str, float]]  # tokens and probabilities
    kl: float  # nats
    update: float


@dataclass(frozen=True)
class Lens:
    prompt: str
    tokens: list[str]  # of the shown positions
    loops: list[list[Seen]]  # by loop, then position

    def means(self) -> list[tuple[float, float]]:
        """Return KL and update of each loop, averaged over the positions."""
        return [
            (statistics.fmean(s.kl for s in row), statistics.fmean(s.update for s in row))
            for row in self.loops
        ]


# ---- from a model to numbers


@torch.no_grad()
def look(
    model: LoopedTransformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    add_bos: bool,
    positions: str = "last",
    top_k: int = 5,
) -> Lens:
    """Run a prompt through the model, and read every loop at its last position, or at all."""
    ids = tokenizer.encode(prompt, add_bos=add_bos and tokenizer.bos_id >= 0, add_eos=False)
    if not ids:
        raise UserError(f"prompt={prompt!r} has no tokens; write a text")
    check_tokens([ids], model)
    device = model.tok_embeddings.weight.device
    states = model.loop_states(torch.tensor([ids], device=device))[:, 0]
    first = 0 if positions == "all" else len(ids) - 1
    loops: list[list[Seen]] = [[] for _ in range(len(states) - 1)]
    top_k = min(top_k, model.args.vocab_size)
    for start in range(first, len(ids), AT_ONCE):
        part = states[:, start : start + AT_ONCE]
        last = model.logits_of(part[-1]).log_softmax(-1)
        for t, row in enumerate(loops):
            logp = model.logits_of(part[t + 1]).log_softmax(-1)
            if not logp.isfinite().all():
                raise UserError("the model's logits are NaN or infinite; use another checkpoint")
            kl = F.kl_div(logp, last, reduction="none", log_target=True).sum(-1).clamp(min=0)
            before, after = part[t].float(), part[t + 1].float()
            update = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
            values, tokens = logp.topk(top_k)
            found = zip(
                tokens.tolist(), values.exp().tolist(), kl.tolist(), update.tolist(), strict=True
            )
            for i, (chosen, p, nats, size) in enumerate(found, start=start):
                texts = [token_text(tokenizer, ids[i], token) for token in chosen]
                row.append(Seen(list(zip(texts, p, strict=True)), nats, size))
    shown = [token_text(tokenizer, ids[i - 1] if i else None, ids[i]) for i in range(len(ids))]
    return Lens(prompt, shown[first:], loops)


def token_text(tokenizer: Tokenizer, before: int | None, token: int) -> str:
    """Return a token as it continues the one before it; <number> if it is part of a character."""
    specials = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    if token in specials:
        return specials[token]
    prefix = tokenizer.decode([]) if before is None else tokenizer.decode([before])
    whole = tokenizer.decode([token] if before is None else [before, token])
    text = whole[len(prefix) :] if whole.startswith(prefix) else tokenizer.decode([token])
    text = text.replace(" ", "␣").encode("unicode_escape").decode() if "\n" in text else text
    text = "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in text)
    return text.replace(" ", "␣") if text and "\ufffd" not in text else f"<{token}>"


# ---- output


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def print_lens(lens: Lens, number: str, positions: str) -> None:
    """Print a table of at most WIDTH columns."""
    prompt = textwrap.shorten(lens.prompt, WIDTH - 12, placeholder=" …")
    print_text(f"{number}prompt: {prompt}")
    means = lens.means()
    if positions == "last":
        print_text(f"loop      KL  update  top tokens after {lens.tokens[-1]!r}")
        for t, (row, (kl, update)) in enumerate(zip(lens.loops, means, strict=True), start=1):
            cells = [f"{cut(text, 12)} {p:.3f}" for text, p in row[-1].top]
            line = f"{t:4} {kl:7.4f} {update:7.4f}  {'  '.join(cells)}"
            print_text(cut(line, WIDTH))
        print_text("")
        return
    # As many loops as fit: the last ones, and the first.
    n_loops = len(lens.loops)
    shown = list(range(n_loops))
    while 16 + 9 * len(shown) > WIDTH:
        del shown[1]
    size = min(20, (WIDTH - 16) // len(shown)) - 1
    heads = "".join(f" {f'loop {t + 1}':{size}}" for t in shown)
    print_text(f"{'token':16}{heads}".rstrip())
    for i, token in enumerate(lens.tokens):
        cells = "".join(f" {cut(lens.loops[t][i].top[0][0], size):{size}}" for t in shown)
        print_text(f"{cut(token, 16):16}{cells}".rstrip())
    agree = [
        statistics.fmean(
            a.top[0][0] == b.top[0][0] for a, b in zip(row, lens.loops[-1], strict=True)
        )
        for row in lens.loops
    ]
    for name, values in (
        ("mean KL", [kl for kl, _ in means]),
        ("mean update", [update for _, update in means]),
        ("same as last", agree),
    ):
        cells = "".join(f" {f'{values[t]:.4f}':{size}}" for t in shown)
        print_text(f"{name:16}{cells}".rstrip())
    if len(shown) < n_loops:
        print_text(f"{n_loops - len(shown)} loops are not shown; format=json has all")
    print_text("")


def draw(lenses: Sequence[Lens], positions: str, out: Path) -> None:
    """Draw one row a prompt: a grid of top tokens by loop, then KL and updates.

    positions=last: columns are ranks, and colours probabilities; all: tokens of the prompt, and KL.
    """
    pyplot = import_pyplot(needed_by="the picture")
    if any(len(one.tokens) > MAX_PANEL for one in lenses):
        logger.warning("the picture shows the last %d positions", MAX_PANEL)
    n_loops = len(lenses[0].loops)
    n_columns = max(
        len(one.tokens[-MAX_PANEL:]) if positions == "all" else len(one.loops[0][0].top)
        for one in lenses
    )
    size = (max(7.0, 3.9 + 0.78 * n_columns), len(lenses) * (1.7 + 0.36 * n_loops))
    figure, grid = pyplot.subplots(
        len(lenses),
        2,
        figsize=size,
        dpi=150,
        squeeze=False,
        layout="constrained",
        width_ratios=[0.78 * n_columns, 2.8],
    )
    for (left, right), lens in zip(grid, lenses, strict=True):
        if positions == "all":
            columns = [cut(token, 8) for token in lens.tokens[-MAX_PANEL:]]
            cells = [[(s.top[0][0], s.kl) for s in row[-MAX_PANEL:]] for row in lens.loops]
            name, colours = "KL to the last loop (nats)", "Oranges"
        else:
            columns = [f"top {k + 1}" for k in range(len(lens.loops[0][-1].top))]
            cells = [row[-1].top for row in lens.loops]
            name, colours = "probability", "Blues"
        values = [[value for _, value in row] for row in cells]
        top = max(1e-3, *(value for row in values for value in row))
        image = left.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=top)
        for t, row in enumerate(cells):
            for i, (text, value) in enumerate(row):
                is_dark = value > 0.6 * top
                left.text(
                    *(i, t, cut(text, 8)),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if is_dark else "black",
                )
        left.set_xticks(range(len(columns)), columns, fontsize=8)
        left.set_xlabel("prediction after this token" if positions == "all" else "")
        left.set_yticks(range(n_loops), [str(t + 1) for t in range(n_loops)])
        left.set_ylabel("loop")
        left.set_title(textwrap.shorten(lens.prompt, 60, placeholder=" …"), loc="left", fontsize=9)
        figure.colorbar(image, ax=left, pad=0.01, fraction=0.04, label=name)
        numbers = range(1, n_loops + 1)
        kl, update = (list(values) for values in zip(*lens.means(), strict=True))
        if n_loops > 1:  # the last loop's is 0
            right.plot(
                numbers[:-1], kl[:-1], "o-", color=COLOURS[0], ms=4, label="KL to the last loop"
            )
        right.plot(numbers, update, "s-", color=COLOURS[1], ms=4, label="relative update")
        right.set_yscale("log")
        set_plain_ticks(right.yaxis)
        right.set_xticks(numbers if n_loops <= 12 else range(1, n_loops + 1, n_loops // 8))
        right.set_xlabel("loop")
        right.grid(alpha=0.25)
        right.spines[["top", "right"]].set_visible(False)
        right.legend(frameon=False, fontsize=8)
    figure.get_layout_engine().set(wspace=0.08)
    with warnings.catch_warnings():  # fonts lack some of the characters of a vocabulary
        warnings.filterwarnings("ignore", message="Glyph")
        save_figure(figure, out)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    args = parse_args(LensArgs, argv, prog="python -m apps.LT2.scripts.loop_lens", doc=__doc__)
    if args.out is not None:
        import_pyplot(needed_by="the picture")
        make_writable("out", Path(args.out).parent)
    model, tokenizer, config = load_model_and_tokenizer(
        args.ckpt,
        dtype=args.dtype,
        device=args.device,
        loop_count=args.loop_count,
        tokenizer_path=args.tokenizer_path,
    )
    options = {"positions": args.positions, "top_k": args.top_k}
    add_bos = config["data"].get("add_bos", True)
    lenses = [look(model, tokenizer, text, add_bos=add_bos, **options) for text in args.texts()]
    if args.format == "json":
        print_text(json.dumps([asdict(lens) for lens in lenses], indent=2, ensure_ascii=False))
    else:
        for i, lens in enumerate(lenses, start=1):
            number = f"[{i}/{len(lenses)}] " if len(lenses) > 1 else ""
            print_lens(lens, number, args.positions)
    if args.out is not None:
        draw(lenses, args.positions, Path(args.out))
        if args.format == "table":
            print(f"figure: {args.out}")


if __name__ == "__main__":
    run_cli(main)
