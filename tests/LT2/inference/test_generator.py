"""Packed, cached generation equals a full forward for every token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from apps.LT2.inference.compiled import compiled_for_generation
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import load_model_and_tokenizer
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer
from tests.lingua.tokenizer_kinds import TOKENIZER_KINDS, make_tokenizer
from tests.LT2.inference.generators import TOKENIZER, make_generator
from tests.LT2.scripted import Scripted
from tests.LT2.tiny import CACHE_KINDS, KINDS, save_run, tiny_model
from tests.tolerances import FP32, assert_same

TEXT = "the quick brown fox jumps over the lazy dog, twice"
# 1 to 40 tokens with BOS
PROMPTS = [TEXT[i : i + n] for i, n in enumerate([3, 0, 39, 1, 7, 12, 2])]


def encode(prompt: str) -> list[int]:
    return TOKENIZER.encode(prompt, add_bos=True, add_eos=False)


def texts_of_lengths(lengths) -> list[list[int]]:
    """Return BOS and random lower-case letters, as token ids."""
    generator = torch.Generator().manual_seed(0)
    return [
        [TOKENIZER.bos_id, *torch.randint(97, 123, (n - 1,), generator=generator).tolist()]
        for n in lengths
    ]


@torch.no_grad()
def greedy_tokens(model, tokens: list[int], n: int) -> list[int]:
    """Decode by definition: a full forward for each token."""
    answer: list[int] = []
    while len(answer) < n and TOKENIZER.eos_id not in answer:
        logits = model(torch.tensor([tokens + answer]))
        answer.append(int(logits[0, -1].argmax()))
    return answer


@torch.no_grad()
def assert_greedy(model, prompts: list[list[int]], answers: list[list[int]], n: int) -> None:
    """Check that the answers are `greedy_tokens`, with one forward.

    The model is causal, so each position predicts the same token as a forward that ends there.
    """
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    best = model(torch.tensor([row + [0] * (longest - len(row)) for row in rows])).argmax(-1)
    for prompt, answer, row in zip(prompts, answers, best.tolist(), strict=True):
        assert len(answer) == n or answer[-1] == TOKENIZER.eos_id
        first = len(prompt) - 1
        assert answer == row[first : first + len(answer)], f"after {len(prompt)} tokens"


# ---- exactness

# The hybrids of the paper are 4:1.
CASES: dict[str, tuple[str, dict]] = {kind: (kind, {}) for kind in CACHE_KINDS}
CASES["4:1 hybrid"] = ("hybrid", {"n_layers": 5, "attention_pattern": "4:1"})
LENGTHS = [*range(1, 101, 6), 63, 64, 65]  # 64 is a chunk of the linear mixers


def case_model(case: str, loop_count: int):
    kind, changes = CASES[case]
    return tiny_model(kind, loop_count, **changes)


@pytest.mark.parametrize("case, loop_count", [*((case, 4) for case in CASES), ("4:1 hybrid", 1)])
def test_greedy_tokens_are_the_argmax_of_full_forwards(case, loop_count):
    """Prompts of 1 to 100 tokens, more than the cache has rows."""
    model = case_model(case, loop_count)
    prompts = texts_of_lengths(LENGTHS)
    done = list(make_generator(model, max_tokens=700).complete(prompts, score=False))
    assert_greedy(model, prompts, [completion.tokens for completion in done], 8)
    assert len({t for c in done for t in c.tokens}) > 16, "too few distinct tokens"


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_a_forward_for_every_token(kind):
    model = tiny_model(kind, 2)
    prompts = PROMPTS[2:6]
    want = [greedy_tokens(model, encode(p), 8) for p in prompts]
    assert [c.tokens for c in make_generator(model).complete(prompts)] == want


@pytest.mark.parametrize("case", CASES)
def test_greedy_is_exact_at_other_loop_counts_than_trained(case, tmp_path):
    save_run(tmp_path, case_model(case, 2))
    for loop_count in (1, 4):
        model = load_model_and_tokenizer(str(tmp_path), device="cpu", loop_count=loop_count)[0]
        assert len(model.layout) == loop_count
        prompts = texts_of_lengths([1, 70, 33])
        assert_greedy(
            model, prompts, [done.tokens for done in make_generator(model).complete(prompts)], 8
        )


@pytest.mark.parametrize("case", CASES)
def test_loglikelihoods_and_greedy_flags_equal_a_forward(case):
    """Also for prompts that are cut to the window."""
    model = case_model(case, 2)
    prompts = [encode(p) for p in PROMPTS[:4]] + texts_of_lengths([90])
    prompts.append(encode("a") + greedy_tokens(model, encode("a"), 8))
    window = 35
    _, loglikelihoods, greedy = make_generator(
        model, max_prompt_len=window, max_gen_len=0
    ).generate(prompts)
    assert sum(len(prompt) > window for prompt in prompts) == 2
    for prompt, got, flags in zip(prompts, loglikelihoods, greedy, strict=True):
        tokens = torch.tensor([prompt[-window:]])
        logits = model(tokens)[0, :-1]
        want = -F.cross_entropy(logits, tokens[0, 1:], reduction="none")
        assert_same(got, want, FP32, f"a prompt of {len(prompt)} tokens")
        assert torch.equal(flags, logits.argmax(-1) == tokens[0, 1:])


def test_greedy_flags_are_true_for_a_greedy_answer():
    model = tiny_model("hybrid", 2)
    prompt = encode("once")
    answer = greedy_tokens(model, prompt, 8)
    flags = make_generator(model, max_gen_len=0).generate([prompt + answer])[2][0]
    assert flags[len(prompt) - 1 :].tolist() == [True] * 8


def test_bfloat16_weights_and_cache():
    """Compares only the prompts' scores, as rounding may change the tokens."""
    model = tiny_model("hybrid", 2)
    want = make_generator(model).generate(PROMPTS)[1]
    for name, param in model.named_parameters():
        if param.ndim == 2 and "conv" not in name and name != "rho":
            param.data = param.data.bfloat16()
    texts, got, _ = make_generator(model).generate(PROMPTS)
    assert len(texts) == len(PROMPTS)
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=0.05, atol=0.3)


# ---- the end of an answer


def test_eos_ends_one_answer_of_a_batch():
    eos = TOKENIZER.eos_id
    model = Scripted([*b"ab", eos, *b"xyz"], [*b"cdef"], [eos, *b"q"])
    done = list(make_generator(model, max_gen_len=4).complete(["1", "22", "333"]))
    assert [c.text for c in done] == ["ab", "cdef", ""]
    assert [c.tokens for c in done] == [[*b"ab", eos], [*b"cdef"], [eos]]


def test_decoding_stops_when_all_answers_are_done():
    model = Scripted([*b"ab", TOKENIZER.eos_id], [TOKENIZER.eos_id])
    make_generator(model, max_gen_len=40).generate(["1", "2"])
    assert model.n_steps == 2


@pytest.mark.parametrize(
    "until, want, n_tokens",
    [
        (["cd"], "ab", 4),
        (["a"], "", 1),  # in the first token
        (["ef", "de"], "abc", 5),
        (["f\N{EURO SIGN}g"], "abcde", 10),
        (["nothing"], "abcdef\N{EURO SIGN}gh", 11),
    ],
)
def test_stop_strings_may_span_tokens(until, want, n_tokens):
    script = [*"abcdef\N{EURO SIGN}gh".encode()]
    done = next(make_generator(Scripted(script), max_gen_len=11, until=until).complete(["x"]))
    assert done.text == want
    assert done.tokens == script[:n_tokens]


def test_until_can_change_between_calls():
    generator = make_generator(Scripted([*b"abcdef"]), max_gen_len=6)
    generator.cfg = replace(generator.cfg, until=["bcd"])
    assert generator.generate(["x"])[0] == ["a"]


def test_until_ignores_the_prompt():
    generator = make_generator(Scripted([*b"ab"]), max_gen_len=2, until=["xa"])
    assert generator.generate(["x"])[0] == ["ab"]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_prompt_and_answer_are_their_decoded_tokens(kind):
    tokenizer = make_tokenizer(kind)
    model = tiny_model("full", 1, n_layers=1, vocab_size=tokenizer.n_words + 20)
    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=12, temperature=1.0, top_p=0.99)
    generator = PackedCausalTransformerGenerator(cfg, model, tokenizer)
    prompts = [prompt for prompt in generator.prepare(["the", "The function"]) if prompt]
    streamed = [""] * 4

    def on_text(i, text):
        streamed[i] += text

    done = list(generator.complete(prompts, num_samples=2, on_text=on_text, score=False))
    for i, answer in enumerate(done):
        prompt = prompts[i // 2]
        assert tokenizer.decode(prompt) + answer.text == tokenizer.decode(prompt + answer.tokens)
        assert streamed[i] == answer.text
        assert max(answer.tokens) < tokenizer.n_words


def test_an_id_without_a_token_is_never_generated():
    class Gaps(ByteTokenizer):
        gaps = (98, 99)

    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=3)
    done = list(PackedCausalTransformerGenerator(cfg, Scripted([*b"abc"]), Gaps()).complete(["x"]))
    assert done[0].tokens == [97, 0, 0]


def test_padding_of_the_vocabulary_is_never_generated():
    model = tiny_model("full", 1, vocab_size=300)
    model.output.weight[258:] *= 50
    for temperature in (0.0, 1.0):
        done = list(make_generator(model, temperature=temperature).complete(PROMPTS))
        assert all(t < 258 for c in done for t in c.tokens)


# ---- sampling


def test_a_low_temperature_is_greedy():
    model = tiny_model("gdn", 2)
    greedy, cold = make_generator(model), make_generator(model, temperature=1e-6)
    assert cold.generate(PROMPTS)[0] == greedy.generate(PROMPTS)[0]


# ---- prompts


def test_long_prompts_are_cut_at_their_start(caplog):
    model = tiny_model("full", 2)
    texts, loglikelihoods, _ = make_generator(model, max_prompt_len=10).generate([TEXT, "short"])
    assert "1 of 2 prompts" in caplog.text
    cut = encode(TEXT)[-10:]
    want_texts, want, _ = make_generator(model).generate([cut, encode("short")])
    assert texts == want_texts
    assert [len(t) for t in loglikelihoods] == [9, 5]
    torch.testing.assert_close(loglikelihoods, want, rtol=0, atol=0)


def test_a_prompt_may_fill_the_cache_but_not_exceed_it():
    model, tokens = tiny_model("hybrid", 2), encode(TEXT)
    make_generator(model, max_tokens=len(tokens) + 8).generate([tokens])
    with pytest.raises(UserError, match=f"prompt 2 of 2.*max_tokens={len(tokens) + 8}"):
        make_generator(model, max_tokens=len(tokens) + 7).generate(["short", tokens])


@pytest.mark.parametrize("token", [-1, 258])
def test_a_token_outside_the_vocabulary_is_an_error(token):
    with pytest.raises(UserError, match=rf"prompt 2 of 2: token {token} .*model\.vocab_size=258"):
        make_generator(tiny_model("hybrid", 2)).generate(["text", [1, token, 2]])


def test_an_empty_prompt_starts_from_bos():
    generator = make_generator(tiny_model("hybrid", 2))
    assert generator.generate([""])[0] == generator.generate([[TOKENIZER.bos_id]])[0]
    assert generator.generate([""])[1][0].shape == (0,)
    without = PackedCausalTransformerGenerator(
        generator.cfg, generator.model, TOKENIZER, add_bos=False
    )
    assert without.generate([""])[0] == generator.generate([""])[0]
    assert without.generate(["a"])[1][0].shape == (0,)

    class NoBos(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.bos_id = -1

    bare = PackedCausalTransformerGenerator(generator.cfg, generator.model, NoBos())
    bare.generate(["a"])
    with pytest.raises(UserError, match="empty prompt"):
        bare.generate([""])


def test_no_prompts_give_no_answers():
    assert make_generator(tiny_model("hybrid", 2)).generate([]) == ([], [], [])


def test_max_gen_len_0_only_scores():
    texts, loglikelihoods, _ = make_generator(tiny_model("hybrid", 2), max_gen_len=0).generate(
        ["abc"]
    )
    assert texts == [""] and len(loglikelihoods[0]) == 3


def test_generation_does_not_disturb_training():
    model = tiny_model("hybrid", 2).requires_grad_(True)
    tokens = torch.tensor([encode(TEXT)])
    make_generator(model).generate(PROMPTS)
    model(tokens[:, :-1], target=tokens[:, 1:]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nan_weights_are_an_error():
    model = tiny_model("full", 1)
    model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        make_generator(model).generate(["a"])


def test_out_of_memory_names_the_option(monkeypatch):
    def init_cache(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("full", 1)
    monkeypatch.setattr(model, "init_cache", init_cache)
    with pytest.raises(UserError, match="^max_tokens=1000 "):
        make_generator(model).generate(["a"])


# ---- compilation


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("part", ["prefill", "step"])
def test_compiled_layers_give_the_same_tokens_at_all_lengths(part, monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = tiny_model("full", 2, n_layers=1)
    plain = make_generator(model)
    option = {"prefill": "compile_prefilling", "step": "compile_decoding"}[part]
    compiled = make_generator(model, **{option: True})
    n_graphs = []
    for lengths in ([5, 9, 3], [7, 2], [20, 4, 8, 11], [6, 13, 3]):
        prompts = texts_of_lengths(lengths)
        want = [c.tokens for c in plain.complete(prompts)]
        assert [c.tokens for c in compiled.complete(prompts)] == want
        n_graphs.append(len(graphs))
    assert n_graphs[0] > 0 and n_graphs[-2] == n_graphs[-1], "recompiled for other lengths"
    assert not any(part in vars(block) for block in model.layers), "the model is not restored"


def test_an_error_restores_the_uncompiled_model():
    model = tiny_model("full", 1)
    with pytest.raises(KeyError), compiled_for_generation(model, prefill=True, step=True):
        raise KeyError
    assert not any({"prefill", "step"} & vars(block).keys() for block in model.layers)


# ---- options


def test_graphs_need_a_gpu():
    cfg = PackedCausalTransformerGeneratorArgs
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert cfg().uses_graph(gpu) and not cfg().uses_graph(cpu)
    assert cfg(reduce_generation_overhead=True).uses_graph(gpu)
    for device in (cpu, gpu):
        assert not cfg(reduce_generation_overhead=False).uses_graph(device)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 2},
        {"top_p": 0},
        {"top_k": -2},
        {"max_gen_len": -1},
        {"max_prompt_len": 0},
        {"max_tokens": 8},
        {"until": ["x", ""]},
        {"dtype": "int8"},
        {"reduce_generation_overhead": True},
    ],
)
def test_an_invalid_option_is_named(option):
    with pytest.raises(UserError, match=f"^{next(iter(option))}"):
        make_generator(tiny_model("full", 1), **option)


def test_progress_counts_answers_and_tokens(capsys):
    make_generator(tiny_model("hybrid", 2), show_progress=True, max_tokens=50).generate(PROMPTS)
    n_tokens = 8 * len(PROMPTS)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith(f"{len(PROMPTS)}/{len(PROMPTS)} answers, {n_tokens} tokens")
