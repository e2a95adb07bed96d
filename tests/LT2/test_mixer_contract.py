"""Every mixer has its tests: cases, a definition, a GPU oracle, and options with an effect.

A mixer of MIXERS without one of them fails, with a message that says what to add.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.LT2.mixers import MIXERS
from apps.LT2.mixers.retnet import RetNet, RetNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.gpu.test_layers_gpu import ORACLES
from tests.LT2.mixer_cases import (
    CASES,
    OTHER_SHARED_VALUES,
    OTHER_VALUES,
    Case,
    definition_of,
    file_of_tests,
    forward_with_loss,
    make,
    model_args,
    tokens,
)
from tests.tolerances import FP32, FP32_GRAD, assert_same

ROOT = Path(__file__).parents[2]


def cases_of(name: str) -> list[Case]:
    return [case for case in CASES.values() if case.mixer == name]


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a mixer's section with their defaults."""
    section = getattr(LoopedTransformerArgs(), MIXERS[name].module_name, None)
    return {} if section is None else vars(section)


def missing_tests(name: str) -> list[str]:
    """Return what a contributor must add for the mixer `name`."""
    missing, where = [], "in tests/LT2/mixer_cases.py"
    section = MIXERS[name].module_name
    if not cases_of(name):
        missing.append(f"a row of {name} in CASES {where}")
    if definition_of(name) is None:
        missing.append(
            f"`definition` in {file_of_tests(name)}: the paper's equation in plain torch"
        )
    if name not in ORACLES:
        missing.append(f"a row of {name} in ORACLES in tests/gpu/test_layers_gpu.py")
    for option in sorted(options_of(name).keys() - OTHER_VALUES.get(section, {}).keys()):
        missing.append(f"model.{section}.{option} in OTHER_VALUES {where}")
    for option in sorted(MIXERS[name].reads - OTHER_SHARED_VALUES.keys()):
        missing.append(f"model.{option}, which {name} reads, in OTHER_SHARED_VALUES {where}")
    return missing


def require_tests(name: str) -> None:
    missing = missing_tests(name)
    assert not missing, f"the mixer {name} lacks tests. Add " + "; ".join(missing)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_its_tests(name):
    require_tests(name)


# ---- the definition


OTHER_CONSTANTS = {"norm_eps": 1e-3, "mixer_norm_eps": 2e-3, "rope_theta": 500.0}


def assert_equals_definition(case: Case, definition: Callable[..., Any]) -> None:
    """Compare output, own loss and every gradient over one sequence longer than a chunk."""
    case = dataclasses.replace(case, args=OTHER_CONSTANTS | case.args)
    mixer, x = make(case).double(), tokens(1, 70).double().requires_grad_()
    weights = dict(mixer.named_parameters())
    got, got_loss = forward_with_loss(mixer, x, case)
    want = definition(weights, model_args(case), x[0], case.window)
    want, want_loss = want if isinstance(want, tuple) else (want, 0.0)
    assert_same(got[0], want, FP32)  # gates, angles and norms are computed in fp32
    assert_same(torch.as_tensor(got_loss), torch.as_tensor(want_loss), FP32, "own loss")
    inputs = {"x": x} | weights
    probe = torch.randn_like(want)
    got_grads, want_grads = (
        torch.autograd.grad((out * probe).sum() + loss, inputs.values())
        for out, loss in ((got[0], got_loss), (want, want_loss))
    )
    for key, g, w in zip(inputs, got_grads, want_grads, strict=True):
        assert_same(g, w, FP32_GRAD, f"gradient of {key}")


def test_a_mixer_equals_its_definition(case):
    definition = definition_of(case.mixer)
    assert definition is not None, f"add `definition` to {file_of_tests(case.mixer)}"
    assert_equals_definition(case, definition)


@pytest.mark.parametrize("name", MIXERS)
def test_a_definition_is_independent(name):
    """It runs no code of apps or lingua."""
    require_tests(name)
    case, definition, ours = cases_of(name)[0], definition_of(name), set()
    assert definition is not None
    weights = dict(make(case).named_parameters())
    args = dataclasses.replace(model_args(case), mixer_norm_eps=1e-3)

    def note(frame: Any, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "apps") or path.is_relative_to(ROOT / "lingua"):
            ours.add(f"{frame.f_code.co_name} in {path.relative_to(ROOT)}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        definition(weights, args, tokens(1, 3)[0], case.window)
    finally:
        sys.setprofile(before)
    assert not ours, f"`definition` in {file_of_tests(name)} calls {sorted(ours)}"


# ---- the options


def results(case: Case) -> list[Tensor]:
    """Return what a mixer computes in its first training step and in inference."""
    mixer, x = make(case).double(), tokens(1, 40).double()
    mixer.begin_step(0)
    trained = forward_with_loss(mixer, x, case)
    mixer.begin_step(None)
    return [torch.as_tensor(y) for y in (*trained, mixer(x, window=case.window))]


def with_option(case: Case, option: str, value: Any) -> Case:
    """Set model.<option>; an option of a section is written as in gdn.conv_size."""
    section, _, field = option.rpartition(".")
    if section:
        own = getattr(model_args(case), section)
        option, value = section, dataclasses.replace(own, **{field: value})
    return dataclasses.replace(case, args=case.args | {option: value})


def assert_option_has_effect(name: str, option: str, *values: Any) -> None:
    """One of the values must change the results of one of the mixer's cases."""
    accepted = False
    for case in cases_of(name):
        before = results(case)
        for value in values:
            with suppress(UserError):  # a case may refuse a value
                after = results(with_option(case, option, value))
                accepted = True
                if not all(map(torch.equal, before, after)):
                    return
    assert accepted, f"every case of {name} refuses model.{option}={values}"
    pytest.fail(f"nothing in {name} reads model.{option}")


@pytest.mark.parametrize("name, option", [(m, o) for m in MIXERS for o in options_of(m)])
def test_every_option_changes_the_output(name, option):
    require_tests(name)
    section = MIXERS[name].module_name
    assert_option_has_effect(name, f"{section}.{option}", OTHER_VALUES[section][option])


HEADS = {"n_heads": None, "head_dim": None}
DELTA_RULE = HEADS | {"conv_size": 4, "allow_neg_eigval": False}
DEFAULTS = {
    "gdn": DELTA_RULE | {"expand_v": 2.0},
    "kda": DELTA_RULE | {"expand_v": 1.0},
    "deltanet": DELTA_RULE | {"expand_v": 1.0},
    "retnet": HEADS | {"expand_v": 2.0},
    "mamba2": {"expand": 2.0, "head_dim": 64, "state_dim": 128, "n_groups": 1, "conv_size": 4},
    "hgrn2": HEADS | {"expand_v": 1.0, "lower_bound": 0.0},
    "gla": HEADS | {"expand_v": 2.0, "gate_rank": 16},
    "nsa": {"block_size": 64, "n_blocks": 16, "window_size": 512},
    "dsa": {"top_k": 2048, "n_index_heads": 4, "index_head_dim": 64, "warmup_steps": 0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_stay(name):
    """A changed default would change what older YAML files compute."""
    assert options_of(name).items() >= DEFAULTS[name].items()


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_reads_what_it_declares(name):
    """Otherwise the warning about options without effect is wrong."""
    require_tests(name)
    reads, case = MIXERS[name].reads, cases_of(name)[0]
    for option in reads:
        assert_option_has_effect(name, option, *OTHER_SHARED_VALUES[option])
    others = {o: values[0] for o, values in OTHER_SHARED_VALUES.items() if o not in reads}
    changed = dataclasses.replace(case, args=case.args | others)
    assert all(map(torch.equal, results(case), results(changed))), f"{name} reads one of {others}"


# ---- the contract itself


def test_a_mixer_without_tests_fails(monkeypatch):
    class New(RetNet):
        module_name = "new"
        reads = frozenset({"norm_eps"})

    @dataclasses.dataclass
    class WithNew(LoopedTransformerArgs):
        new: RetNetArgs = dataclasses.field(default_factory=RetNetArgs)

    New.__module__ = "apps.LT2.mixers.new"
    monkeypatch.setitem(MIXERS, "new", New)
    monkeypatch.setattr(sys.modules[__name__], "LoopedTransformerArgs", WithNew)
    missing = missing_tests("new")
    for part in ("CASES", "test_new.py", "ORACLES", "model.new.expand_v", "model.norm_eps"):
        assert any(part in line for line in missing), part


def test_a_wrong_decay_fails(monkeypatch):
    class Wrong(RetNet):
        def inputs(self, *args):
            *qkv, g = super().inputs(*args)
            return *qkv, 1.05 * g

    definition = definition_of("retnet")
    assert definition is not None
    monkeypatch.setitem(MIXERS, "retnet", Wrong)
    with pytest.raises(AssertionError, match="relative error"):
        assert_equals_definition(CASES["retnet"], definition)


def test_an_option_that_nothing_reads_fails(monkeypatch):
    @dataclasses.dataclass
    class WithUnread(RetNetArgs):
        decay: float = 1.0

    for name in ("retnet", "retnet_odd_heads"):
        case = dataclasses.replace(CASES[name], args={"retnet": WithUnread()})
        monkeypatch.setitem(CASES, name, case)
    assert_option_has_effect("retnet", "retnet.expand_v", 1.0)
    with pytest.raises(pytest.fail.Exception, match=r"model\.retnet\.decay"):
        assert_option_has_effect("retnet", "retnet.decay", 2.0)
