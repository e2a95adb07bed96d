"""An exported model behaves as users of transformers expect: cache, generation, training."""

from __future__ import annotations

import copy

import pytest
import torch

from apps.LT2.huggingface.export import to_hf_name, write_shards
from apps.LT2.transformer import LoopedTransformer
from tests.LT2.tiny import tiny_args
from tests.tolerances import FP32_GRAD, FP32_MODEL, assert_same

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tests.LT2.huggingface.exported import export, generate, load, modeling, tokens  # noqa: E402, I001

EVERY = ["full", "window", "nsa", "dsa", "kda", "hybrid"]  # kinds of caches


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the exported model of a kind; each is exported once."""
    known = {}

    def get(kind):
        if kind not in known:
            known[kind] = export(tmp_path_factory.mktemp(kind), kind)[1]
        return known[kind].eval()

    return get


# ---- cache


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_a_cache_grows_and_its_rows_move(kind, models, monkeypatch):
    monkeypatch.setattr(modeling(), "SLOTS", 4)
    model, x = models(kind), tokens(2, 17)
    cache = model(x[:, :3]).past_key_values
    assert len(cache) == model.config.loop_count * model.config.num_hidden_layers
    logits = [model(x[:, i : i + 1], past_key_values=cache).logits for i in range(3, 9)]
    assert_same(torch.cat(logits, 1), model(x[:, :9]).logits[:, 3:], FP32_MODEL)
    assert cache.get_seq_length() == 9
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    other.reorder_cache(torch.tensor([3, 0, 2]))
    order = torch.tensor([1, 0, 1])
    got = model(x[order, 9:12], past_key_values=other).logits
    assert_same(got, model(x[order, :12]).logits[:, 9:], FP32_MODEL)
    assert cache.get_seq_length() == 9  # the copy doesn't share memory
    cache.reset()
    assert_same(model(x, past_key_values=cache).logits, model(x).logits, FP32_MODEL)


@pytest.mark.parametrize("kind", ["full", "window", "nsa", "dsa"])
@torch.no_grad()
def test_crop_forgets_the_last_tokens(kind, models):
    model, x = models(kind), tokens(2, 14)
    x = x[:, :5] if kind == "window" else x  # the window of 5 has dropped no token
    n, kept = x.shape[1], x.shape[1] - 3
    mask = torch.ones_like(x)
    mask[1, :2] = 0
    cache = model(x[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    other = tokens(3, 3)[:2, :3]
    cache.crop(kept)
    assert cache.get_seq_length() == kept
    got = [model(other[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
    changed = torch.cat([x[:, :kept], other], 1)
    want = model(changed, attention_mask=mask[:, :n]).logits[:, kept:]
    assert_same(torch.cat(got, 1), want, FP32_MODEL)
    cache.crop(-2)
    assert cache.get_seq_length() == kept + 1
    got = model(other[:, 1:], past_key_values=cache).logits
    assert_same(got, want[:, 1:], FP32_MODEL)


@pytest.mark.parametrize("kind", ["hybrid", "kda", "window"])
@torch.no_grad()
def test_a_past_that_is_gone_cannot_be_cropped(kind, models):
    model, x = models(kind), tokens(1, 9)
    cache = model(x).past_key_values
    with pytest.raises(ValueError, match="loop 0, layer"):
        cache.crop(-1)
    assert cache.get_seq_length() == 9
    with pytest.raises(ValueError, match="assist"):
        generate(model, x, 4, prompt_lookup_num_tokens=2)


@torch.no_grad()
def test_calls_that_cannot_be(models):
    model, x = models("hybrid"), tokens(2, 5)
    for options, problem in [
        ({"past_key_values": transformers.DynamicCache()}, "LT2Cache"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"attention_mask": torch.zeros(2, 5)}, "attention_mask"),
        ({"position_ids": 2 * torch.arange(5)[None]}, "position_ids"),
        ({"output_attentions": True}, "output_attentions"),
        ({"past_key_values": model(x[:1]).past_key_values}, "past_key_values"),
        ({"input_ids": x[:, :0]}, "no tokens"),
        *(({"loop_count": count}, f"loop_count={count!r}") for count in (0, "2", 2.5)),
    ]:
        with pytest.raises(ValueError, match=problem):
            model(**{"input_ids": x, **options})
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, x, 2, cache_implementation="static")
    for n in (3, 5):  # transformers would continue another text
        past = model(x).past_key_values
        with pytest.raises(ValueError, match="past_key_values holds 5 tokens"):
            generate(model, x[:, :n], 2, past_key_values=past)


# ---- generate


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_beams_are_those_without_a_cache(kind, models):
    model, x = models(kind), tokens(2, 11)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    new = generate(model, x, 6, **options)
    assert torch.equal(new, generate(model, x, 6, use_cache=False, **options))


@torch.no_grad()
def test_ways_to_generate(models):
    model, x = models("full"), tokens(1, 11)
    want = generate(model, x, 12)
    no_token = {"eos_token_id": 1000}  # transformers 5.0 looks for one
    looked_up = generate(model, x.repeat(1, 2), 8, prompt_lookup_num_tokens=3, **no_token)
    assert torch.equal(looked_up, generate(model, x.repeat(1, 2), 8))
    torch.manual_seed(0)
    sampled = generate(model, x, 12, do_sample=True, top_k=4, num_return_sequences=3)
    assert sampled.shape == (3, 12) and not (sampled == want).all()
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(x),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(embedded, want)

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    generate(model, x, 12, streamer=streamer)
    assert streamer.tokens == [*x[0].tolist(), *want[0].tolist(), "end"]
    # a finished row waits for the others
    stop = int(want[0, 5])
    n = want[0].tolist().index(stop) + 1
    both = generate(model, tokens(2, 11).index_copy(0, torch.tensor([0]), x), 12, eos_token_id=stop)
    assert both[0].tolist() == [*want[0, :n].tolist(), *[0] * (both.shape[1] - n)]
    # a conversation: the cache of the first answer serves the second prompt
    cache = modeling().LT2Cache()
    first = model.generate(
        x, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    second = torch.cat([first, tokens(1, 3)], 1)
    got = generate(model, second, 5, past_key_values=cache)
    assert torch.equal(got, generate(model, second, 5))


@pytest.mark.parametrize("kind", ["full", "hybrid"])
@torch.no_grad()
def test_hidden_states_and_chosen_logits(kind, models):
    model, x = models(kind), tokens(2, 6)
    out = model(x, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + 2 * 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(x))
    assert torch.equal(model.lm_head(out.hidden_states[-1]).float(), out.logits)
    one_loop = model(x, output_hidden_states=True, loop_count=1).hidden_states
    assert all(map(torch.equal, one_loop[:3], out.hidden_states[:3]))
    assert torch.equal(model(x, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(model(x, return_dict=False)[0], out.logits)


# ---- weights


@torch.no_grad()
def test_offloaded_weights_come_back_for_their_layer(tmp_path):
    pytest.importorskip("accelerate")
    _, model = export(tmp_path / "hf", "hybrid")
    little = {"device_map": "auto", "max_memory": {"cpu": "90KB"}}
    offloaded = load(tmp_path / "hf", offload_folder=tmp_path / "disk", **little)
    assert "disk" in offloaded.hf_device_map.values()
    x = tokens(2, 7)
    assert torch.equal(offloaded(x).logits, model(x).logits)
    assert torch.equal(generate(offloaded, x, 3), generate(model, x, 3))


@torch.no_grad()
def test_weights_that_are_missing_are_initialized(tmp_path):
    _, model = export(tmp_path, "kda")
    lost = ("model.layers.1.feed_forward.w2.weight", "model.layers.1.kda.A_log")
    kept = {name: w for name, w in model.state_dict().items() if name not in lost}
    write_shards(tmp_path, {name: w.clone() for name, w in kept.items()})
    found = load(tmp_path).state_dict()
    torch.testing.assert_close({n: found[n] for n in kept}, kept, rtol=0, atol=0)
    assert all(found[name].isfinite().all() and found[name].std() > 0.05 for name in lost)
    # a new model is initialized as ours is
    fresh = modeling().LT2ForCausalLM(model.config)
    assert all(p.isfinite().all() and p.abs().max() < 20 for p in fresh.parameters())
    torch.manual_seed(0)
    fresh.init_own_weights()
    ours = LoopedTransformer(tiny_args("kda", 2))
    torch.manual_seed(0)
    ours.init_weights()
    for name, weight in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[to_hf_name(name)], weight), name


@torch.no_grad()
def test_a_vocabulary_grows(tmp_path):
    _, model = export(tmp_path / "hf", "hybrid", weight_tying=True)
    x = tokens(1, 7)
    want = model(x).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    assert_same(model(x).logits[..., :258], want, FP32_MODEL)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(x).logits, model(x).logits)


# ---- training


@pytest.mark.parametrize("kind", ["hybrid", "dsa"])
def test_checkpointed_gradients_are_the_gradients(kind, models, monkeypatch):
    model, x = models(kind), tokens(2, 9)
    calls, forward = [], modeling().FeedForward.forward
    monkeypatch.setattr(
        modeling().FeedForward, "forward", lambda *a: calls.append(0) or forward(*a)
    )
    mask = torch.ones_like(x)
    mask[1, 6:] = 0
    found = []
    for reentrant in (None, False, True):
        model.train().zero_grad()
        calls.clear()
        if reentrant is not None:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        labels = x.masked_fill(mask == 0, -100)
        loss = model(x, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert len(calls) == 2 * 3 * (1 if reentrant is None else 2)  # loops, layers, recomputed
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.gradient_checkpointing_disable()
    assert all(grad.any() for grad in found[0].values())
    for other in found[1:]:
        for name, grad in found[0].items():
            assert_same(other[name], grad, FP32_GRAD, name)
    model.zero_grad(set_to_none=True)


def test_packed_documents_do_not_see_each_other(models):
    model, x = models("hybrid"), tokens(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = model(x, position_ids=positions).logits
        parts = [model(part).logits for part in (x[:, :5], x[:, 5:])]
    assert_same(packed, torch.cat(parts, 1), FP32_MODEL)


def test_gradients_reach_the_prompt_in_eval_mode(models):
    model, x = models("hybrid"), tokens(1, 7)
    embedded = model.get_input_embeddings()(x).detach().requires_grad_()
    out = model(inputs_embeds=embedded)
    out.logits.sum().backward()
    assert embedded.grad.any() and out.past_key_values.get_seq_length() == 7
    # the cache doesn't hold the graph
    memories = [entry.memory for entry in out.past_key_values.layers]
    assert not any(x.requires_grad for memory in memories for x in memory.snapshot())
    model(x[:, :1], past_key_values=out.past_key_values)
    model.zero_grad(set_to_none=True)


def data():
    return [{"input_ids": row, "labels": row} for row in tokens(8, 16)]


def trainer(model, folder):
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
            max_steps=20,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data(),
        eval_dataset=data()[:2],
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_lowers_the_loss(tmp_path):
    pytest.importorskip("accelerate")
    _, model = export(tmp_path / "hf", "hybrid")
    run = trainer(model, tmp_path / "out")
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 1
    assert run.evaluate()["eval_loss"] < losses(run)[0] - 1
    run.save_model(tmp_path / "saved")
    x = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(x).logits, model.eval()(x).logits)


def test_lora_trains_saves_and_loads(tmp_path):
    peft = pytest.importorskip("peft")
    _, base = export(tmp_path / "hf", "hybrid")
    config = peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    linears = {
        name
        for name, module in load(tmp_path / "hf").named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert len(adapted) == len(linears) > 20
    run = trainer(model, tmp_path / "out")
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "hf"), tmp_path / "adapter").eval()
    # with many tokens our mixers multiply by fused weights; an adapter must have its say
    x = tokens(1, 600)
    with torch.no_grad():
        logits = model.eval()(x).logits
        assert torch.equal(again(x).logits, logits)
        merged = model.merge_and_unload()
        assert_same(merged(x).logits, logits, FP32_MODEL)
