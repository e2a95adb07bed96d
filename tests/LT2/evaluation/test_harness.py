"""The harness's model: tokenization, windows and generation settings, with lm_eval requests."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from apps.LT2.evaluation.chat import ChatTemplate, find_chat_template
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import LoadedModel
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer, TokenizerArgs
from tests.lingua.dist_utils import run_ranks
from tests.lingua.tokenizer_kinds import make_tokenizer
from tests.LT2.tiny import tiny_model

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.utils import get_rolling_token_windows  # noqa: E402

from apps.LT2.evaluation.harness import EvalHarnessLM, RegisteredLM, generation_settings  # noqa: E402

TEXT = "the quick brown fox jumps over the lazy dog, twice and once again"
MAX_LEN = 24


def make_lm(add_bos=True, add_eos=True, model=None, tokenizer=None, **options) -> EvalHarnessLM:
    stride = options.pop("stride", None)
    data = {"tokenizer": {"name": "bytes"}, "add_bos": add_bos, "add_eos": add_eos}
    model = model or tiny_model("hybrid", 2, max_seqlen=MAX_LEN)
    loaded = LoadedModel(model, tokenizer or ByteTokenizer(), {"data": data})
    cfg = PackedCausalTransformerGeneratorArgs(**{"max_gen_len": 8, "max_tokens": 64, **options})
    return EvalHarnessLM(loaded, cfg, stride=stride)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@torch.no_grad()
def log_probability(model, tokens, n) -> float:
    """Return the log-probability of the last n tokens, given at most MAX_LEN preceding tokens."""
    read = tokens[-(MAX_LEN + 1) :]
    logp = model(torch.tensor([read[:-1]])).double().log_softmax(-1)[0]
    return logp[torch.arange(len(read) - 1), read[1:]][-n:].sum().item()


@pytest.mark.parametrize("add_bos", [True, False])
def test_loglikelihoods_match_a_direct_forward(add_bos):
    lm = make_lm(add_bos)
    pairs = [(TEXT[:n], TEXT[n : n + m]) for n, m in [(3, 4), (20, 5), (50, 6), (60, 1)]]
    got = lm.loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), (loglikelihood, _) in zip(pairs, got, strict=True):
        tokens = [256] * add_bos + list((context + continuation).encode())
        n = len(continuation) + len(context) - len(context.rstrip())
        assert loglikelihood == pytest.approx(log_probability(lm.model, tokens, n), rel=1e-5)


def test_a_long_prompt_is_truncated_at_its_start():
    lm = make_lm()
    long, short = (TEXT * 3, " yes"), ((TEXT * 3)[-(MAX_LEN - 3) :], " yes")
    bare = make_lm(add_bos=False).loglikelihood(requests("loglikelihood", short))
    (got,) = lm.loglikelihood(requests("loglikelihood", long))
    assert got[0] == pytest.approx(bare[0][0], rel=1e-5) and got[0] < -1


def test_a_text_without_context_starts_with_bos_or_eos():
    for add_bos, first in ((True, 256), (False, 257)):
        lm = make_lm(add_bos)
        got = lm.loglikelihood(requests("loglikelihood", ("", "abc"), (" ", "x")))
        want = [log_probability(lm.model, [first, *text], len(text)) for text in (b"abc", b" x")]
        assert [score for score, _ in got] == pytest.approx(want, rel=1e-5)


def test_an_empty_choice_is_a_user_error():
    empty = Instance("loglikelihood", {}, ("a", ""), 1, ("quiz", 5, 1))
    with pytest.raises(UserError, match="harness.tasks: quiz"):
        make_lm().loglikelihood([*requests("loglikelihood", ("a", "b")), empty])


class Merging(ByteTokenizer):
    """Encodes `the` as one token, which may cross the boundary of a pair."""

    def _encode(self, text):
        return [300 if piece == "the" else ord(piece) for piece in self._pieces(text)]

    def _pieces(self, text):
        return [
            p for i, part in enumerate(text.split("the")) for p in (["the"] * (i > 0) + [*part])
        ]


@pytest.mark.parametrize(
    "context, continuation, want",
    [
        ("a b", " c", ([256, *b"a b"], [*b" c"])),
        ("a b ", "c", ([256, *b"a b"], [*b" c"])),
        ("a\n\n", "c", ([256, *b"a"], [*b"\n\nc"])),
        ("a th", "e c", ([256, *b"a "], [300, *b" c"])),
        ("th", "e", ([256], [300])),
        ("the", " c", ([256, 300], [*b" c"])),
    ],
)
def test_the_boundary_of_a_pair(context, continuation, want):
    assert make_lm(tokenizer=Merging()).encode_pair(context, continuation) == want


def rolling_score(model, text, context_len) -> float:
    windows = get_rolling_token_windows([*text.encode()], 256, MAX_LEN, context_len)
    return sum(log_probability(model, [*read, said[-1]], len(said)) for read, said in windows)


def test_rolling_windows_match_the_harness():
    lm = make_lm()
    texts = [TEXT, TEXT[:10], "", TEXT[:MAX_LEN]]
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    for text, score in zip(texts, got, strict=True):
        windows = get_rolling_token_windows([*text.encode()], 256, MAX_LEN, 1)
        want = sum(
            log_probability(lm.model, [*read, said[-1]], len(said)) for read, said in windows
        )
        assert score == pytest.approx(want, rel=1e-5)


def test_a_smaller_stride_gives_each_token_more_context():
    lm = make_lm(stride=4)
    (got,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)))
    want = rolling_score(lm.model, TEXT, context_len=MAX_LEN - 3)
    assert got == pytest.approx(want, rel=1e-5)
    (whole,) = make_lm().loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)))
    assert abs(got - whole) > 1e-3


# ---- generation


@torch.no_grad()
def continue_greedily(model, text, n) -> str:
    tokens, answer = [256, *text.encode()][-(MAX_LEN - n) :], []
    while len(answer) < n and 257 not in answer:
        answer.append(int(model(torch.tensor([tokens + answer]))[0, -1, :258].argmax()))
    return ByteTokenizer().decode(answer)


def test_requests_with_different_settings():
    lm = make_lm()
    texts = [TEXT[i : i + n] for i, n in enumerate([3, 12, 1, 7, 60])]
    plain = [continue_greedily(lm.model, text, 6) for text in texts]
    stop = plain[1][2:4]
    settings = [
        {"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 1},
        {"until": stop, "max_gen_toks": 6},
        {"until": ["\n\n never"], "max_gen_toks": 3},
        {"until": None, "max_new_tokens": 6, "num_beams": 1},
        {"until": [""], "max_gen_toks": 6, "do_sample": True, "temperature": 1e-6},
    ]
    got = lm.generate_until(requests("generate_until", *zip(texts, settings, strict=True)))
    assert got == [
        plain[0],
        plain[1][: plain[1].index(stop)],
        continue_greedily(lm.model, texts[2], 3),
        plain[3],
        plain[4],
    ]


def test_an_answer_keeps_the_blank_before_its_first_word():
    tokenizer = make_tokenizer("sp-bpe")
    options = {"n_layers": 1, "max_seqlen": MAX_LEN, "vocab_size": tokenizer.n_words}
    lm = make_lm(model=tiny_model("full", 1, **options), tokenizer=tokenizer)
    asked = [(text, {"max_gen_toks": 5}) for text in ("the", "The function", "a (")]
    for (text, _), answer in zip(
        asked, lm.generate_until(requests("generate_until", *asked)), strict=True
    ):
        tokens = tokenizer.encode(text, True, False)
        generator = PackedCausalTransformerGenerator(
            replace(lm.cfg, max_gen_len=5), lm.model, tokenizer
        )
        (done,) = generator.complete([tokens])
        assert text + answer == tokenizer.decode(tokens + done.tokens)


def generate_on_rank(rank, world_size, max_tokens=60):
    lm = make_lm(max_tokens=max_tokens)
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 6}
    asked = [(TEXT[:n], sampled if n % 2 else {"max_gen_toks": 5}) for n in range(1, 14)]
    return lm.generate_until(requests("generate_until", *asked))


def test_samples_do_not_depend_on_ranks_or_batches():
    want = generate_on_rank(0, 1)
    assert len(set(want)) > 8
    assert generate_on_rank(0, 1, max_tokens=1000) == want
    assert run_ranks(2, generate_on_rank) == [want, want]


@pytest.mark.parametrize(
    "given, want",
    [
        ({}, (0.0, 8, [])),
        ({"do_sample": True}, (1.0, 8, [])),
        ({"temperature": 0.7}, (0.7, 8, [])),
        ({"do_sample": False, "temperature": 0.7}, (0.0, 8, [])),
        ({"until": "\n", "max_gen_toks": 99, "max_tokens": 3}, (0.0, 99, ["\n"])),
    ],
)
def test_generation_settings_have_the_harness_semantics(given, want):
    cfg = generation_settings(given, PackedCausalTransformerGeneratorArgs(max_gen_len=8))
    assert (cfg.temperature, cfg.max_gen_len, cfg.until) == want
    hot = PackedCausalTransformerGeneratorArgs(temperature=0.5)
    assert generation_settings({}, hot).temperature == 0.5


def test_unsupported_generation_settings_are_user_errors():
    with pytest.raises(UserError, match="generation_kwargs: typical_p=0.9, num_beams=4"):
        generation_settings(
            {"num_beams": 4, "typical_p": 0.9}, PackedCausalTransformerGeneratorArgs()
        )


@pytest.mark.parametrize("top_k", [-1, 0, -1.0])
def test_no_limit_of_top_k(top_k):
    def sample(top_k):
        settings = {"do_sample": True, "temperature": 2.0, "top_k": top_k, "max_gen_toks": 6}
        return make_lm().generate_until(requests("generate_until", (TEXT, settings)))

    assert sample(top_k) == sample(None) != sample(1)


# ---- chat templates, caches, the registered name


def test_a_chat_template_beside_the_tokenizer(tmp_path):
    lm = make_lm()
    with pytest.raises(UserError, match="apply_chat_template=true: no chat template"):
        lm.apply_chat_template([])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    lm._tokenizer_args = SimpleNamespace(name="hf", path=str(tmp_path))
    history = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(history) == "user: hi\nassistant:"
    assert lm.apply_chat_template(history, add_generation_prompt=False) == "user: hi\n"
    assert lm.chat_template(True) == template


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0].role.name.first }}", "here: .*cannot format"),
        ("{{ messages[0].role + 1 }}", "here: .*cannot format"),
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("{% for m in messages %}", "not a chat template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "here: .*unsafe"),
        ("{{ raise_exception.__globals__['os'].getcwd() }}", "here: .*unsafe"),
        ("{{ messages.append(1) }}", "here: .*unsafe"),
        ("{{ 1 // 0 }}", "here: .*cannot format"),
        ("{{ messages[0].role.encode('nope') }}", "here: .*cannot format"),
    ],
)
def test_a_failing_chat_template_is_a_user_error(template, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate(template, "here").render([{"role": "user", "content": "hi"}], True)


def test_the_default_of_several_chat_templates_is_used(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    config = tmp_path / "tokenizer_config.json"
    tokenizer = TokenizerArgs(name="hf", path=str(tmp_path))
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_chat_template(tokenizer).text == "b"
    config.write_text(json.dumps([named]))
    with pytest.raises(UserError, match="tokenizer_config.json"):
        find_chat_template(tokenizer)
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(UserError, match="apply_chat_template=true: no chat template"):
        find_chat_template(tokenizer)


def test_a_cache_of_answers_needs_one_process(monkeypatch):
    hook = SimpleNamespace(dbdict={})
    make_lm().set_cache_hook(hook)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="use_cache"):
        make_lm().set_cache_hook(hook)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 8}, "max_tokens"),
        ({"ckpt": "nowhere", "max_token": 3}, "unknown option max_token; did you mean max_tokens"),
        ({}, "ckpt is not set"),
    ],
)
def test_model_args_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        RegisteredLM(**options)


@pytest.mark.parametrize("stride", [0, -1, MAX_LEN + 1])
def test_a_stride_must_fit_the_window(stride):
    with pytest.raises(UserError, match=f"harness.stride={stride} must be 1 to the {MAX_LEN}"):
        make_lm(stride=stride)


def test_max_tokens_of_zero_is_a_user_error(monkeypatch):
    loaded = LoadedModel(tiny_model("hybrid", 1), ByteTokenizer(), {})
    monkeypatch.setattr(
        "apps.LT2.evaluation.harness.load_model_and_tokenizer", lambda *_, **__: loaded
    )
    with pytest.raises(UserError, match="max_tokens=0"):
        RegisteredLM(ckpt="somewhere", max_tokens=0)
