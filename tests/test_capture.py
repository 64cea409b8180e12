"The captured training step: the same numbers as the plain one, and no trace of its warm-up."

import gc
import itertools
import weakref

import pytest
import torch
from pretend_cuda import Graph, pretend_cuda

from nanogpt_nb.capture import CapturedStep, agree, capture, without_trace
from nanogpt_nb.config import PRESETS, NanoGPTConfig
from nanogpt_nb.data import load_dataset
from nanogpt_nb.optim import hold_rates, make_optimizers, pack, set_lr, unpack
from nanogpt_nb.runs import Run
from nanogpt_nb.train import train
from nanogpt_nb.trainer import Trainer, TrainError

SMALL = dict(n_layer=2, n_embd=16, num_heads=2, block_size=8, batch_size=4, warmup_iters=3, max_iters=20, dtype="float32", ngram_rows=500)
OPTIONS = dict(optimizer=("adamw", "muon"), dropout=(0.0, 0.2), gradient_accumulation_steps=(1, 2), grad_clip=(0.0, 0.5))
ALL = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
COVER = [ALL[i] for i in (0, 3, 5, 6, 9, 10, 12, 15)]  # every value with every other
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text():
    return load_dataset(NanoGPTConfig.preset("tiny"))


def small(preset: str, **changes) -> NanoGPTConfig:
    return NanoGPTConfig.preset(preset).replace(**SMALL | changes)


def trainer(config, text, captured: bool, device="cpu") -> Trainer:
    t = Trainer(config, text, device)
    if captured and device == "cpu":
        t.captured = CapturedStep(t)
    elif captured:
        capture(t, pytest.fail)
        assert t.captured.graph
    return t


def everything(t: Trainer) -> list[torch.Tensor]:
    "Weights, moments and random numbers."
    moments = [v for o in t.optimizers for s in o.state.values() for k, v in sorted(s.items())]
    streams = [t.batches.get_state(), torch.get_rng_state()] + ([torch.cuda.get_rng_state(t.device)] if t.device.type == "cuda" else [])
    return [x.detach().cpu().clone() for x in [*t.model.parameters(), *moments, *streams]]


def take(t: Trainer, n: int, seed: int | None = 1) -> list[torch.Tensor]:
    "The losses of `n` steps, and everything after them."
    if seed is not None:
        torch.manual_seed(seed)
    return [t.train_step() for _ in range(n)] + everything(t)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def check_equal(preset, options, text):
    config = small(preset, **options)
    plain, ours = (take(trainer(config, text, captured), 20) for captured in (False, True))
    assert same(plain, ours)
    assert plain[19] != plain[0] and not same(plain[:19], plain[1:20])


@pytest.mark.parametrize("preset, options", list(zip(itertools.cycle(PRESETS), COVER, strict=False)), ids=str)
def test_the_body_is_the_plain_step_to_the_bit(preset, options, text):
    check_equal(preset, options, text)


@pytest.mark.slow
@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_body_is_the_plain_step_to_the_bit_everywhere(preset, options, text):
    check_equal(preset, options, text)


@pytest.mark.parametrize(
    "changes", [dict(ngrams=3), dict(dtype="bfloat16", mlp="swiglu"), dict(position="rope", tie_weights=True)], ids=str
)
def test_the_body_is_the_plain_step_for_other_models(changes, text):
    check_equal("modern", changes, text)


def test_a_text_that_is_mapped_from_the_disk(text):
    "Where the tokens do not fit in memory, the rows travel instead of their places."
    import dataclasses

    mapped = dataclasses.replace(text, train=text.train.numpy().astype("uint16"))
    config = small("tiny", gradient_accumulation_steps=2)
    assert not trainer(config, mapped, True).captured.there
    assert same(take(trainer(config, mapped, True), 5), take(trainer(config, text, False), 5))


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("optimizer", OPTIONS["optimizer"])
def test_a_warm_up_leaves_no_trace(optimizer, before, text):
    config = small("modern", optimizer=optimizer, dropout=0.2)
    t, untouched = (trainer(config, text, captured) for captured in (True, False))
    assert same(take(t, before), take(untouched, before))
    places = [p.data_ptr() for p in t.model.parameters()]
    kept = everything(t)
    with without_trace(t):
        t.captured.rehearse(t.captured.body)
        t.captured.feed(t.batches), t.captured.body()
        assert not same(everything(t)[: len(kept)], kept)
    if before:
        assert same(everything(t), kept)
    assert [p.data_ptr() for p in t.model.parameters()] == places and all(p.grad is None for p in t.model.parameters())
    assert same(take(t, 10), take(untouched, 10))


def test_a_warm_up_that_fails_leaves_no_trace_either(text):
    t = trainer(small("modern", dropout=0.2), text, True)
    take(t, 3)
    kept = everything(t)
    with pytest.raises(ZeroDivisionError), without_trace(t):
        t.captured.feed(t.batches), t.captured.body()
        1 / 0  # noqa: B018
    assert same(everything(t), kept)


@pytest.mark.parametrize("captured", list(itertools.product((False, True), repeat=2)), ids=str)
def test_a_checkpoint_goes_on_either_way(captured, text, tmp_path):
    config = small("modern", dropout=0.2, max_iters=40)
    first = trainer(config, text, captured[0])
    take(first, 10)
    first.save(tmp_path)
    saved = torch.load(tmp_path / "trainer.pt", weights_only=True)
    assert all(type(g["lr"]) is float for o in saved["optimizers"] for g in o["param_groups"])
    expected = take(first, 10, seed=None)
    second = trainer(config.replace(seed=5), text, False)
    second.load(tmp_path)
    if captured[1]:
        second.captured = CapturedStep(second)
        with without_trace(second):
            second.captured.rehearse(second.captured.body)
    assert same(take(second, 10, seed=None), expected)


def test_a_load_ends_what_was_captured(text, tmp_path):
    t = trainer(small("modern"), text, True)
    t.save(tmp_path)
    t.load(tmp_path)
    assert t.captured is None
    assert same(take(t, 3), take(trainer(small("modern"), text, False), 3))


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize("held", [False, True])
def test_rates_of_any_kind_are_read(held, rate, text):
    "Checkpoints of other versions and devices: rates as numbers or tensors, with or without room for a graph."
    config = small("modern")
    t = trainer(config, text, held)
    take(t, 2)
    states = [pack(o) for o in t.optimizers]
    for s in states:
        for g in s["param_groups"]:
            g |= dict(lr=rate, capturable=True)
    for o, s in zip(t.optimizers, states, strict=True):
        unpack(o, s)
    groups = [g for o in t.optimizers for g in o.param_groups]
    assert {torch.is_tensor(g["lr"]) for g in groups} == {held} and {float(g["lr"]) for g in groups} == {0.25}
    assert not any(g["capturable"] for g in t.optimizers[0].param_groups)
    set_lr(t.optimizers, 0.5)
    assert float(groups[0]["lr"]) == 0.5 * config.learning_rate


def test_state_with_too_few_groups_is_refused(text):
    (o,) = make_optimizers(trainer(small("lecture", optimizer="adamw"), text, False).model, small("lecture", optimizer="adamw"))
    state = pack(o)
    with pytest.raises(ValueError):
        unpack(o, state | {"param_groups": state["param_groups"][:1]})


def test_rates_stay_where_they_are(text):
    optimizers = trainer(small("modern"), text, False).optimizers
    hold_rates(optimizers, torch.device("cpu"))
    rates = [g["lr"] for o in optimizers for g in o.param_groups]
    set_lr(optimizers, 0.5), set_lr(optimizers, 0.1)
    assert all(a is g["lr"] for a, g in zip(rates, (g for o in optimizers for g in o.param_groups), strict=True))
    assert rates[0].item() == pytest.approx(0.1 * small("modern").learning_rate)


def test_what_is_played_back_has_to_do_the_same(text):
    t = trainer(small("modern", dropout=0.2), text, True)

    def rehearsed(run):
        with without_trace(t):
            return t.captured.rehearse(run)

    expected = rehearsed(t.captured.body)
    agree(rehearsed(t.captured.body), expected)

    def half_a_step():
        t.captured.loss.copy_(expected[0].mean())

    for wrong, said in ((half_a_step, "weights"), (lambda: t.captured.loss.fill_(torch.nan), "losses")):
        with pytest.raises(TrainError, match=said):
            agree(rehearsed(wrong), expected)
    with pytest.raises(TrainError, match="random numbers"):
        agree((*expected[:2], expected[2] + 1), expected)


@pytest.mark.parametrize("options", COVER[:4], ids=str)
@pytest.mark.parametrize("before", [0, 4])
def test_the_way_of_recording_leaves_no_trace(before, options, text, monkeypatch):
    "All but CUDA itself: warm-up, rehearsals and their comparison, then steps by replay alone."
    config = small("modern", **options)
    t, plain = trainer(config, text, True), trainer(config, text, False)
    assert same(take(t, before), take(plain, before))
    step, kept = t.captured, everything(t)
    pretend_cuda(monkeypatch, step.body, around=lambda: without_trace(t))
    step.record()
    (graph,) = Graph.made
    assert step.graph is graph and graph.played == 2 and gc.isenabled()
    if before:
        assert same(everything(t), kept)
    assert same(take(t, 6), take(plain, 6)) and graph.played == 8


@pytest.mark.parametrize("what", ["error", "nothing", "too often"])
def test_a_recording_that_goes_wrong_leaves_no_trace(what, text, monkeypatch):
    config = small("modern", dropout=0.2)
    t, plain = trainer(config, text, True), trainer(config, text, False)
    step, t.captured = t.captured, None
    assert same(take(t, 4), take(plain, 4))
    does = dict(error=step.body, nothing=lambda: None).get(what, lambda: (step.body(), step.body()))
    here, set_to = pretend_cuda(
        monkeypatch, does, around=lambda: without_trace(t), fails=RuntimeError("broke off") if what == "error" else None
    )
    with pytest.raises(RuntimeError if what == "error" else TrainError), without_trace(t):
        step.record()
    assert gc.isenabled() and set_to == ([here] if what == "error" else [])
    assert same(take(t, 6), take(plain, 6))


def test_a_trainer_that_is_let_go_takes_what_was_captured_along(text):
    t = trainer(small("tiny"), text, True)
    t.train_step()
    gone = weakref.ref(t.captured)
    del t
    assert gone() is None


def pretend(monkeypatch, error):
    "Trainers that believe to be on a GPU when they are captured, where it fails."

    def fails(self, trainer):
        raise error

    monkeypatch.setattr(CapturedStep, "__init__", fails)


def test_without_a_graph_training_goes_on_and_says_so(text, monkeypatch):
    t, said = trainer(small("modern"), text, False), []
    pretend(monkeypatch, RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines"))
    t.device = torch.device("cuda")
    capture(t, said.append)
    t.device = torch.device("cpu")
    assert (
        len(said) == 1
        and "going on without: CUDA error: operation not permitted when stream is capturing" in said[0]
        and "\n" not in said[0]
    )
    assert same(take(t, 3), take(trainer(small("modern"), text, False), 3))


@pytest.mark.parametrize("why", ["cpu", "mps", "off", "ranks"])
def test_it_is_not_tried_where_it_cannot_be(why, text, monkeypatch):
    t = trainer(small("modern", cuda_graph=why != "off"), text, False)
    pretend(monkeypatch, AssertionError(f"tried: {why}"))
    t.device = torch.device("mps" if why == "mps" else "cpu" if why == "cpu" else "cuda")
    if why == "ranks":
        t.ranks.world = 2
    said = []
    capture(t, said.append)
    assert said == [] and t.captured is None


def test_a_run_may_go_on_with_or_without(tmp_path):
    config = NanoGPTConfig.preset("tiny").replace(max_iters=4, eval_interval=4, eval_iters=1, sample_tokens=4)
    run = train(config, name="a", runs_dir=tmp_path, quiet=True)
    again = train(run.config.replace(cuda_graph=False, max_iters=6), resume=run, quiet=True)
    assert isinstance(again, Run) and again.status["step"] == 6


# On a GPU


@needs_gpu
@pytest.mark.parametrize("preset, options", list(zip(itertools.cycle(PRESETS), COVER, strict=False)), ids=str)
def test_played_back_it_is_the_plain_step_within_rounding(preset, options, text):
    config = small(preset, **options)
    plain, ours = (torch.stack(take(trainer(config, text, captured, "cuda"), 20)[:20]).cpu() for captured in (False, True))
    assert torch.allclose(plain, ours, atol=2e-2)
    assert plain.unique().numel() > 15


@needs_gpu
def test_resumed_equals_never_stopped_on_a_gpu(text, tmp_path):
    config = small("modern", dropout=0.2, max_iters=40)
    whole = trainer(config, text, True, "cuda")
    take(whole, 10)
    whole.save(tmp_path)
    expected = [x.cpu() for x in take(whole, 10, seed=None)]
    resumed = Trainer(config.replace(seed=5), text, "cuda")
    resumed.load(tmp_path)
    capture(resumed, pytest.fail)
    assert resumed.captured and same([x.cpu() for x in take(resumed, 10, seed=None)], expected)
    on_a_cpu = Trainer(config, text)
    on_a_cpu.load(tmp_path)
    assert torch.stack([on_a_cpu.train_step() for _ in range(3)]).isfinite().all()


@needs_gpu
def test_what_begins_on_a_cpu_goes_on_captured(text, tmp_path):
    config = small("modern", max_iters=40)
    here = trainer(config, text, False)
    take(here, 10)
    here.save(tmp_path)
    there = Trainer(config, text, "cuda")
    there.load(tmp_path)
    capture(there, pytest.fail)
    a, b = (torch.stack([t.train_step().cpu() for _ in range(5)]) for t in (here, there))
    assert there.captured and torch.allclose(a, b, atol=2e-2)


@needs_gpu
def test_a_step_waits_for_nothing(text):
    t = trainer(small("modern"), text, True, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            t.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert t.step == 3


@needs_gpu
def test_a_recording_that_fails_leaves_a_trainer_that_trains(text, monkeypatch):
    config, said = small("modern", dropout=0.2), []
    t = Trainer(config, text, "cuda")
    real = CapturedStep.body
    monkeypatch.setattr(CapturedStep, "body", lambda self: (real(self), torch.cuda.is_current_stream_capturing() and self.loss.item()))
    capture(t, said.append)
    assert t.captured is None and len(said) == 1
    plain, ours = (torch.stack(take(x, 10)[:10]).cpu() for x in (Trainer(config, text, "cuda"), t))
    assert torch.allclose(plain, ours, atol=2e-2)
