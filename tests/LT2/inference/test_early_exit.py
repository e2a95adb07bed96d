"""Generation with early exits: continuous batching, counts, the command, and CUDA graphs."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apps.LT2 import generate
from apps.LT2.exits import ExitRule
from apps.LT2.inference.early_exit import ExitDecoder
from lingua.errors import UserError
from tests.LT2.inference.generators import UNTIL, make_generator
from tests.LT2.looped_models import make, prompt
from tests.LT2.tiny import save_run, tiny_model

EXITS = ["gate:0.6", "kl:0.6"]


def gated(kind: str = "hybrid"):
    model = tiny_model(kind, 3, loop_loss="gate")
    model.exit_gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("gated"), gated())


@pytest.mark.parametrize("exit", EXITS)
def test_answers_equal_those_alone_and_loops_are_counted(exit):
    """Two rows of the cache serve six answers of different lengths."""
    model, prompts = gated(), ["a", "a longer one", "third", "4", "five", "the sixth"]
    generator = make_generator(model, exit=exit, max_gen_len=10, max_tokens=48, until=UNTIL)
    texts, _, _ = generator.generate(prompts)
    got, alone, n_loops, n_tokens = generator.mean_loops, [], 0.0, 0
    for one in prompts:
        done = next(iter(generator.complete([one])))
        alone.append(done.text)
        n_tokens += len(done.tokens) - 1  # the first one comes from the prompt's pass
        n_loops += (len(done.tokens) - 1) * (generator.mean_loops or 0)
    assert texts == alone
    assert got == pytest.approx(n_loops / n_tokens) and 1 < got < 3


def test_a_fixed_exit_equals_fewer_loops():
    model = gated()
    want = make_generator(model, exit="2").generate(["a prompt"])
    assert len(model.inference_layout) == 3
    model.set_loops(2)
    got = make_generator(model).generate(["a prompt"])
    assert got[0] == want[0] and torch.equal(got[1][0], want[1][0])


def test_the_command_reports_loops(run, capsys, caplog):
    command = [f"ckpt={run}", "device=cpu", 'prompts=["a loop"]', "max_gen_len=8"]
    generate.main([*command, "exit=gate:0.6"])
    assert " of 3 loops per token" in capsys.readouterr().err
    generate.main(command)
    assert "loops" not in capsys.readouterr().err
    generate.main([*command, "exit=kl:0.1", "loop_count=2"])
    assert "exit=kl:0.1 has no effect" in caplog.text
    for wrong in ("exit=gate:1", "exit=9", "exit=soon"):
        with pytest.raises(UserError, match=wrong):
            generate.main([*command, wrong])


# ---- CUDA graphs


class Recorder(TorchDispatchMode):
    def __init__(self, calls: list):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    """Records the operations of a capture. A replay writes their results to the same tensors."""

    def __init__(self):
        self.calls: list = []

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            result = func(*args, **kwargs)
            both = (
                (recorded, result) if isinstance(result, tuple | list) else ([recorded], [result])
            )
            for old, new in zip(*both, strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.fixture
def cuda(monkeypatch):
    @contextmanager
    def capture(graph, pool, capture_error_mode):
        with Recorder(graph.calls):
            yield

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other) -> None:
            pass

        def synchronize(self) -> None:
            assert self.device is not None, "the current device may be another than the model's"

    for name, fake in {
        "CUDAGraph": FakeGraph,
        "graph_pool_handle": lambda: 0,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(device),
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("rule", [ExitRule("gate", 0.6), ExitRule("kl", 0.2)], ids=str)
def test_graphs_equal_eager_steps(cuda, rule):
    model = make(
        loop_loss="gate", loop_count=3, mixer="gdn", attention_pattern="1:1"
    ).requires_grad_(False)
    model.exit_gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    rows: list = [0, 1]
    decoders = []
    for graph in (True, False):
        cache, tokens = model.init_cache(2, 12), prompt(2, 12)
        decoders.append(ExitDecoder(model, cache, rule, graph=graph, rows=rows))
        assert cache.lengths == [0, 0] and decoders[-1].tally.n_loops == 0
        model.prefill(tokens[:, :3], cache)
    for i, token in enumerate(tokens[:, 3:].split(1, 1)):
        rows[1] = None if i > 4 else 1
        assert torch.equal(*(decoder.step(token) for decoder in decoders))
    graphs, eager = (decoder.tally for decoder in decoders)
    assert graphs == eager and 1 < eager.n_loops / eager.n_tokens < 3
    assert eager.n_tokens == 2 * 5 + 4
