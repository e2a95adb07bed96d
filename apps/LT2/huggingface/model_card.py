"""Write README.md, the model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.LT2.flops import count_parameters
from apps.LT2.inference.load import LoadedModel
from apps.LT2.pattern import format_layout
from apps.LT2.scripts.report_data import LOSSES, score_rows, values_of
from lingua.args import flatten_dict
from lingua.checkpointing.folder import FOLDER_PATTERN
from lingua.config.help import format_value
from lingua.files.atomic import write_atomic
from lingua.runs import Run, read_runs

CARD_NAME = "README.md"
CITATION = """\
@misc{deng2026lt2lineartimeloopedtransformers,
  title={LT2: Linear-Time Looped Transformers},
  author={Chunyuan Deng and Yizhe Zhang and Rui-Jie Zhu and Yuanyuan Xu and Jiarui Liu and
          T. S. Eugene Ng and Hanjie Chen},
  year={2026},
  eprint={2605.20670},
  archivePrefix={arXiv},
  primaryClass={cs.LG},
  url={https://arxiv.org/abs/2605.20670},
}"""
TRAINED = {  # options of the run, by their names in the card
    "steps": "steps",
    "sequence length": "data.seq_len",
    "optimizer": "optim.name",
    "learning rate": "optim.lr",
    "weight decay": "optim.weight_decay",
    "precision": "distributed.model_dtype",
    "seed": "seed",
}
Rows = list[tuple[str, str]]


def write_model_card(folder: Path, loaded: LoadedModel, source: Path) -> None:
    """Write README.md into `folder`, which has config.json and the tokenizer's files.

    Args:
        folder: the exported folder, or the temporary folder that becomes it.
        loaded: the model, tokenizer and config that were exported.
        source: the checkpoint, as `find_checkpoint` returns it. Losses and scores are what its run
            has recorded at this step. A file of weights has no run, so its card has none.

    The card has no paths of this machine.
    """
    args, run = loaded.model.args, _find_run(source)
    step = int(source.name) if run else 0
    is_ours = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "lt2"
    )
    mixers = sorted({spec.mixer for loop in args.layout() for spec in loop})
    tags = ["lt2", *(["looped-transformer"] if args.loop_count > 1 else []), *mixers]
    header = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    has_chat = (folder / "chat_template.jinja").is_file()
    parts = [
        "\n".join(["---", *(f"{k}: {v}" for k, v in header.items()), "tags:"])
        + "".join(f"\n- {tag}" for tag in tags)
        + "\n---",
        f"# {loaded.config.get('name') or (run.path.name if run else 'LT2 model')}",
        _summary(loaded),
        "## Use",
        _use(is_ours, has_chat, args.loop_count),
        "## Model",
        _table(("", ""), _sizes(loaded)),
        f"```\n{format_layout(args.layout())}\n```",
        "## Training",
        _table(("", ""), _training(loaded.config, run, step)),
    ]
    if run and (scores := _scores(run, step)):
        parts += ["## Scores", _table(("task", "metric", "score", "chance"), scores)]
    limits = "This model continues text. Its text can be wrong, biased or harmful."
    if is_ours:
        limits += " It needs transformers; vLLM and programs for GGUF files can't run it."
    parts += ["## Limits", limits, "## Citation", f"```bibtex\n{CITATION}\n```"]
    write_atomic(folder / CARD_NAME, "\n\n".join(parts) + "\n")


def _find_run(source: Path) -> Run | None:
    run = source.parent.parent
    if not FOLDER_PATTERN.fullmatch(source.name) or not (run / "metrics.jsonl").is_file():
        return None
    return read_runs([run])[0]


def _summary(loaded: LoadedModel) -> str:
    args = loaded.model.args
    n = count_parameters(loaded.model).total
    kind = "A looped language model" if args.loop_count > 1 else "A language model"
    loops = f" run {args.loop_count} times" if args.loop_count > 1 else ""
    return f"{kind} with {n:,} parameters: {args.n_layers} layers{loops}, trained with LT2."


def _use(is_ours: bool, has_chat: bool, loop_count: int) -> str:
    remote = ", trust_remote_code=True" if is_ours else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'name = "."  # this folder, or USER/NAME on the Hub',
        f"tokenizer = AutoTokenizer.from_pretrained(name{remote})",
        f'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto"{remote})',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=50)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]
    if has_chat:
        lines += [
            "",
            'messages = [{"role": "user", "content": "Hello"}]',
            "text = tokenizer.apply_chat_template(",
            "    messages, tokenize=False, add_generation_prompt=True",
            ")",
            'inputs = tokenizer(text, return_tensors="pt")  # starts with BOS, as in training',
        ]
    lines.append("```")
    notes = []
    n_loops = "1 loop" if loop_count == 1 else f"{loop_count} loops"
    if is_ours:
        notes.append(
            "`trust_remote_code=True` runs the Python file in this folder. It needs torch, "
            "transformers and safetensors. On a GPU it uses the kernels of "
            "`flash-linear-attention`, if installed."
        )
        notes.append(
            f"The model was trained with {n_loops}. `loop_count=` in `from_pretrained`, in a call "
            "or in `generate` changes the number of loops: fewer are faster."
        )
    return "\n\n".join(["\n".join(lines), *notes])


def _sizes(loaded: LoadedModel) -> Rows:
    args, counted = loaded.model.args, count_parameters(loaded.model)
    return [
        ("parameters", f"{counted.total:,}"),
        ("of these in embeddings", f"{counted.embedding:,}"),
        ("layers", str(args.n_layers)),
        ("loops", str(args.loop_count)),
        ("dim", str(args.dim)),
        ("vocabulary", f"{args.vocab_size:,}"),
        ("tokenizer", str(loaded.config["data"]["tokenizer"]["name"])),
        ("trained on sequences of", f"{args.max_seqlen:,} tokens"),
    ]


def _training(config: Mapping[str, Any], run: Run | None, step: int) -> Rows:
    options = flatten_dict(dict(config), sep=".")
    sources = config["data"].get("sources") or {}
    total = sum(sources.values()) or 1
    shares = ", ".join(f"{name} ({weight / total:.0%})" for name, weight in sources.items())
    rows = [("data", shares or "not recorded")]
    rows += [
        (n, format_value(options[o])) for n, o in TRAINED.items() if options.get(o) is not None
    ]
    if run is None:
        return rows
    rows.append(("step of these weights", f"{step:,}"))
    for name, key in (("tokens", "optim/total_tokens"), ("FLOPs", "optim/total_flops")):
        if (found := _at(run, key, step)) is not None:
            rows.append(
                (f"training {name}", f"{found[1]:,.4g}" if name == "FLOPs" else f"{found[1]:,}")
            )
    for key, name in LOSSES.items():
        if (found := _at(run, key, step)) is not None:
            note = "" if found[0] == step else f" (step {found[0]:,})"
            rows.append((name, f"{found[1]:.4f}{note}"))
    return rows


def _at(run: Run, key: str, step: int) -> tuple[int, float] | None:
    """Return the last finite value of a metric up to `step`, and its step."""
    return max(((s, v) for s, v in values_of(run, key).items() if s <= step), default=None)


def _scores(run: Run, step: int) -> list[tuple[str, ...]]:
    rows = []
    for found in run.evaluations:
        if found.step == step:
            for row in score_rows(found):
                name = row["metric"] + (f" ({found.label})" if found.label else "")
                chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
                rows.append((row["task"], name, f"{row['score']:.4f}", chance))
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
