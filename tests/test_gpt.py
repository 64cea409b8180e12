"The model and its optimisers, over all their options."

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_nb.config import PRESETS, ConfigError, NanoGPTConfig
from nanogpt_nb.gpt import GPT, activate, attend, rotary, rotate
from nanogpt_nb.optim import Muon, lr_factor, make_optimizers, newton_schulz, set_lr

OPTIONS = st.builds(
    dict,
    norm=st.sampled_from(["layernorm", "rmsnorm"]), position=st.sampled_from(["learned", "rope"]), mlp=st.sampled_from(["relu", "gelu", "relu2", "swiglu"]),
    bias=st.booleans(), qkv_bias=st.booleans(), qk_norm=st.booleans(), tie_weights=st.booleans(), num_heads=st.sampled_from([1, 2, 4]),
)  # fmt: skip


def model_of(**options):
    torch.manual_seed(1)
    return GPT(NanoGPTConfig(n_embd=16, n_layer=2, block_size=8, dropout=0.0, **options), 11)


@settings(max_examples=40, deadline=None)
@given(OPTIONS, st.integers(1, 7))
def test_no_option_lets_the_future_leak(options, at):
    model = model_of(**options).eval()
    a = torch.randint(11, (2, 8))
    b = a.clone()
    b[:, at] = (b[:, at] + 1) % 11
    with torch.no_grad():
        change = (model(a)[0] - model(b)[0]).abs().amax((0, 2))
    assert change[:at].max() == 0 and change[at] > 0


@settings(max_examples=40, deadline=None)
@given(OPTIONS)
def test_every_weight_gets_a_gradient_and_one_optimiser(options):
    model = model_of(**options)
    x, y = torch.randint(11, (2, 4, 8))
    model(x, y)[1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for optimizer in ("adamw", "muon"):
        optimizers = make_optimizers(model, model.config.replace(optimizer=optimizer))
        held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(held) == sorted({id(p) for p in model.parameters()})
        for g in (g for o in optimizers for g in o.param_groups):
            assert all((p.ndim >= 2) == (g["weight_decay"] > 0) for p in g["params"]) or isinstance(optimizers[-1], Muon)


def test_one_token_too_many():
    with pytest.raises(ConfigError, match="9 tokens are more than block_size=8"):
        model_of(num_heads=2)(torch.zeros(1, 9, dtype=torch.long))


@given(st.integers(0, 6), st.integers(1, 6))
def test_attention_over_a_past_is_the_end_of_attention_over_all(past, new):
    torch.manual_seed(past * 7 + new)
    q, k, v = torch.randn(3, 2, 2, past + new, 4).unbind()
    assert torch.allclose(attend(q[:, :, past:], k, v, past), attend(q, k, v)[:, :, past:], atol=1e-6)


def test_attention_is_the_formula():
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    weights = (q @ k.mT / 2).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf).softmax(-1)
    assert torch.allclose(attend(q, k, v), weights @ v, atol=1e-6)


def test_attention_in_bfloat16_keeps_type_and_value():
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert low.dtype is torch.bfloat16 and torch.allclose(low.float(), attend(q, k, v), atol=0.05)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 11))
def test_rotary_products_depend_on_the_distance_alone(i, j, shift):
    cos, sin = rotary(32, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(5))
    at = lambda x, p: rotate(x, cos[p : p + 1], sin[p : p + 1])  # noqa: E731
    here, there = (at(q, i) * at(k, j)).sum(), (at(q, i + shift) * at(k, j + shift)).sum()
    assert torch.allclose(here, there, atol=1e-4)


def test_swiglu_halves():
    x = torch.randn(3, 8)
    assert torch.equal(activate(x, "swiglu"), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16), (3, 32, 8)])
def test_newton_schulz_makes_singular_values_alike(shape):
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.max() < 1.3 and values.median() > 0.6


@pytest.mark.parametrize("shape, decay", list(itertools.product([(16, 16), (32, 8), (8, 32)], [0.0, 0.1])))
def test_muon_takes_the_steps_of_torchs_own(shape, decay):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a, b = Muon([ours], lr=0.05, weight_decay=decay), torch.optim.Muon([theirs], lr=0.05, weight_decay=decay)
    for _ in range(8):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_a_layer_of_three_matrices_moves_as_three():
    torch.manual_seed(0)
    start, grads = torch.randn(12, 4), torch.randn(5, 12, 4)
    fused, alone = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(w.clone()) for w in start.split(4)]
    fused.parts = 3
    optimizers = [Muon([fused]), Muon(alone)]
    for g in grads:
        fused.grad = g.clone()
        for p, part in zip(alone, g.split(4), strict=True):
            p.grad = part.clone()
        [o.step() for o in optimizers]
    assert torch.allclose(fused, torch.cat(list(alone)), atol=1e-6)


def test_the_model_says_which_layers_are_several():
    parts = {n: getattr(p, "parts", 1) for n, p in model_of(mlp="swiglu", num_heads=2).to("cpu").named_parameters() if p.ndim == 2}
    assert parts["blocks.0.sa.qkv.weight"] == 3 and parts["blocks.0.ffwd.fc.weight"] == 2 and parts["blocks.0.sa.proj.weight"] == 1


def test_stacking_matrices_changes_no_step():
    torch.manual_seed(0)
    start, grads = torch.randn(3, 8, 4), torch.randn(5, 3, 8, 4)
    together, alone = [torch.nn.Parameter(w.clone()) for w in start], [torch.nn.Parameter(w.clone()) for w in start]
    optimizers = [Muon(together), *(Muon([p]) for p in alone)]
    for g in grads:
        for p, q, one in zip(together, alone, g, strict=True):
            p.grad, q.grad = one.clone(), one.clone()
        [o.step() for o in optimizers]
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(together, alone, strict=True))


@given(st.sampled_from(["constant", "cosine", "wsd"]), st.integers(1, 400), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1))
def test_a_schedule_warms_up_and_never_rises_again(schedule, iters, warmup, low, decay):
    c = NanoGPTConfig(schedule=schedule, max_iters=iters, warmup_iters=warmup, min_lr_fraction=low, decay_fraction=decay)
    f = [lr_factor(c, i) for i in range(iters)]
    assert all(0 < x <= 1 or (x == 0 and low == 0) for x in f)
    assert all(a < b for a, b in zip(f[:warmup], f[1:warmup], strict=False))
    after = f[warmup:]
    assert all(a >= b - 1e-12 for a, b in zip(after, after[1:], strict=False))
    assert all(x >= low - 1e-12 for x in after)


@pytest.mark.parametrize("preset", PRESETS)
def test_learning_rates_are_set_from_the_peak_each_time(preset):
    config = NanoGPTConfig.preset(preset)
    optimizers = make_optimizers(GPT(config.replace(n_layer=1), 11), config)
    for f in (0.3, 0.0, 1.0):
        set_lr(optimizers, f)
    assert {g["lr"] for o in optimizers for g in o.param_groups} <= {config.learning_rate, config.muon_learning_rate}
