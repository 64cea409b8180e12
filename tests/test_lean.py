"The backward passes that are written by hand, and the models made of them."

import gc
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from nanogpt_nb import gpt
from nanogpt_nb.args import exit_code
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.data import load_dataset
from nanogpt_nb.gpt import GPT, CausalSelfAttention, rotary, rotate
from nanogpt_nb.lean import LONGEST, HalfLinear, RMSNorm, halve, keep_memory, relu2, rms_norm, short_attention
from nanogpt_nb.ngrams import row_of
from nanogpt_nb.optim import AdamW, Muon
from nanogpt_nb.sample import KVCache, generate, sample
from nanogpt_nb.train import train
from nanogpt_nb.trainer import Trainer

SMALL = NanoGPTConfig.preset("cpu").replace(
    n_layer=2, n_embd=32, num_heads=2, block_size=12, batch_size=4, dtype="float32", device="cpu", max_iters=6, sample_tokens=0
)
TEXT = "".join("how now brown cow, the fox is in the henhouse, "[i * i % 40 :] + "\n" for i in range(60))


def plainly(qkv, rope):
    "The same attention out of PyTorch's own parts."
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = (rotate(F.rms_norm(x.float(), x.shape[-1:]), *rope) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v.float(), is_causal=True).transpose(1, 2).flatten(2)


def apart(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("shape", [(3, 12, 3, 2, 16), (1, 1, 3, 1, 2), (2, LONGEST, 3, 4, 8)], ids=str)
def test_short_attention_is_attention(shape, dtype, most):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape, generator=g).to(dtype)
    rope, out = rotary(shape[1], shape[-1]), torch.randn(shape[0], shape[1], shape[3] * shape[4], generator=g)
    kept, results = qkv.clone(), []
    for f in (short_attention, plainly):
        x = qkv.detach().clone().requires_grad_()
        y = f(x, rope)
        y.backward(out.to(y.dtype))
        results.append((y, x.grad))
    assert apart(results[0][0], results[1][0]) < most
    if shape[1] > 1:
        assert apart(results[0][1], results[1][1]) < most
    assert torch.equal(qkv, kept)  # and the input is as it was
    assert results[0][0].dtype == dtype == results[0][1].dtype


@pytest.mark.parametrize("shape", [(5,), (2, 3, 7)], ids=str)
def test_norm_and_relu2_have_pytorchs_values_and_gradients(shape):
    for ours, theirs in ((rms_norm, lambda x: F.rms_norm(x, x.shape[-1:])), (relu2, lambda x: F.relu(x).square())):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        (a,), (b,) = (torch.autograd.grad(f(x), x, g) for f in (ours, theirs))
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)
        assert torch.allclose(a, b, atol=1e-5)


def test_bits_of_bfloat16_make_the_same_relu():
    h = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # every bfloat16 there is
    h = h[~h.isnan()]
    assert torch.equal(relu2(h), F.relu(h).square())
    turned = torch.randn(8, 6).bfloat16().T  # not in order
    assert torch.equal(relu2(turned), F.relu(turned).square())


def test_autocast_rounds_what_the_norm_writes_and_nothing_before():
    x, g = (torch.randn(64, 128, generator=torch.Generator().manual_seed(i), requires_grad=not i) for i in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x)
        (grad,) = torch.autograd.grad(y, x, g)
        assert torch.equal(RMSNorm()(x), y.bfloat16())
    assert torch.allclose(y, F.rms_norm(x, (128,)), atol=1e-5)
    assert torch.allclose(grad, torch.autograd.grad(F.rms_norm(x, (128,)), x, g)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_small_numbers_of_any_type_are_normalised(dtype):
    x = (0.02 * torch.randn(16, 128, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert rms_norm(x).dtype is dtype and rms_norm(x).float().square().mean().sqrt().item() == pytest.approx(1, abs=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm()(x).dtype is dtype


@pytest.mark.parametrize(
    "f", [rms_norm, relu2, lambda x: short_attention(x.view(2, 4, 3, 1, 2), rotary(4, 2))], ids=["norm", "relu2", "attention"]
)
def test_a_gradient_of_the_gradient_is_refused(f):
    x = torch.randn(2, 24, requires_grad=True)
    (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), x)


def test_norm_writes_what_the_product_reads():
    norm, x = RMSNorm(), torch.randn(2, 8)
    assert norm(x).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype is torch.bfloat16
        assert norm(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [{}, dict(look_back=0, ngrams=3), dict(embed_skip=False, position="learned"), dict(dropout=0.3), dict(block_size=20)],
    ids=str,
)
def test_a_model_learns_the_same_with_and_without(changes, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = SMALL.replace(data=str(tmp_path / "text.txt"), **changes)
    data, losses, used = load_dataset(config), [], []
    monkeypatch.setattr(gpt, "LONGEST", 12)
    monkeypatch.setattr(gpt, "short_attention", lambda *a: used.append(1) or short_attention(*a))
    for _ in range(2):
        trainer = Trainer(config, data)
        losses.append([trainer.train_step().item() for _ in range(6)])
        monkeypatch.setattr(CausalSelfAttention, "is_short", lambda *a: False)
        monkeypatch.setattr(gpt, "RMSNorm", lambda: torch.nn.RMSNorm(config.n_embd, elementwise_affine=False))
        monkeypatch.setattr(gpt, "relu2", lambda h: F.relu(h).square())
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0][-1] < losses[0][0]
    assert bool(used) == (config.position == "rope" and not config.dropout and config.block_size <= 12)


def test_writing_goes_on_where_the_cache_stands():
    torch.manual_seed(0)
    model = GPT(SMALL.replace(zero_init=False, look_back=3, ngrams=3, embed_skip=True), 11).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(11, (2, 10))
    whole, caches = model(idx)[0], [KVCache(2, model.config) for _ in model.blocks]
    with torch.no_grad():
        parts = [model(piece, cache=caches)[0] for piece in idx.split([4, 1, 1, 4], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_the_start_reaches_every_block():
    torch.manual_seed(0)
    model, idx = GPT(SMALL.replace(embed_skip=True, zero_init=False), 11), torch.randint(11, (1, 5))
    before = model(idx)[0]
    with torch.no_grad():
        model.blocks[1].skip[1] = 10.0
    assert apart(model(idx)[0], before) > 0.005


def test_embeddings_of_any_size_begin_alike_where_they_are_normalised():
    torch.manual_seed(0)
    model, idx = GPT(SMALL.replace(embed_norm=True, look_back=0), 11), torch.randint(11, (2, 5))
    before = model(idx)[0]
    with torch.no_grad():
        model.token_embedding.weight.mul_(50)
    assert torch.allclose(model(idx)[0], before, atol=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_halved_it_writes_nearly_the_same(tied):
    torch.manual_seed(0)
    model = GPT(NanoGPTConfig.preset("tiny").replace(tie_weights=tied, bias=not tied, qkv_bias=True), 11).eval()
    idx = torch.randint(11, (2, 10))
    before = model(idx)[0]
    assert halve(model) is model and isinstance(model.lm_head, HalfLinear) is not tied
    assert sum(isinstance(m, HalfLinear) for m in model.modules()) == 4 * model.config.n_layer + (not tied)
    after = model(idx)[0]
    assert after.dtype is torch.float32 and 0 < apart(after, before) < 0.05
    assert model.token_embedding.weight.dtype is torch.float32
    assert generate(model, idx[:, :1], 30).shape == (2, 31)


def test_optimisers_leave_the_compiler_alone():
    code = """
import sys, torch
from nanogpt_nb.ngrams import row_of
from nanogpt_nb.optim import AdamW, Muon
for made in (AdamW, Muon):
    p = torch.nn.Parameter(torch.ones(4, 4)); p.grad = torch.ones(4, 4)
    o = made([p], lr=0.1); o.step(); o.zero_grad(); o.load_state_dict(o.state_dict()); o.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})
    assert p.grad is None and not torch.equal(p, torch.ones(4, 4))
print([m for m in ("torch._dynamo", "sympy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_adamw_goes_on_from_what_pytorchs_left_and_the_other_way():
    g = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    ends = []
    for first, second in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (AdamW, AdamW)):
        p = torch.nn.Parameter(torch.ones(5))
        o = first([p], lr=0.1, fused=True)
        for i, grad in enumerate(g):
            if i == 2:
                o = (other := second([p], lr=0.1, fused=True), other.load_state_dict(o.state_dict()))[0]
            p.grad = grad
            o.step()
        ends.append(p.detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_muon_multiplies_in_what_it_is_told():
    grads, ends = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), []
    for dtype in (None, torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.zeros(16, 8))
        p.grad = grads.clone()
        Muon([p], lr=0.1, dtype=dtype).step()
        ends.append(p.detach())
    assert torch.equal(ends[0], ends[1]) and 0 < apart(ends[2], ends[0]) < 0.1 and ends[2].dtype is torch.float32


def test_one_estimate_at_the_end(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = SMALL.replace(data=str(tmp_path / "text.txt"), eval_interval=0)
    run = train(config, runs_dir=tmp_path / "runs", quiet=True, wandb="disabled")
    assert [row["step"] for row in run.estimates()] == [6] and run.status["state"] == "finished"
    again = train(config.replace(max_iters=8), resume=run, quiet=True, wandb="disabled")
    assert [row["step"] for row in again.estimates()] == [6, 8]
    stopped = train(
        config.replace(max_iters=50),
        name="stopped",
        runs_dir=tmp_path / "runs",
        quiet=True,
        wandb="disabled",
        on_estimate=lambda row: "enough",
    )
    assert [row["step"] for row in stopped.estimates()] == [50]


def test_a_run_that_was_stopped_before_its_one_estimate_can_be_sampled(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self: (step(self), os.kill(os.getpid(), signal.SIGTERM) if self.step == 3 else None)[0]
    )
    run = train(SMALL.replace(data=str(tmp_path / "text.txt"), eval_interval=0), runs_dir=tmp_path / "runs", quiet=True, wandb="disabled")
    assert run.status["state"] == "stopped" and not run.estimates() and "inf" not in (run.path / "log.txt").read_text()
    assert sample(run, "the", 5)[0].startswith("the")


def test_garbage_is_collected_as_before_when_a_command_has_ended():
    before, seen = gc.get_threshold(), []
    assert exit_code(lambda: seen.append(gc.get_threshold())) == 0
    assert seen != [before] and gc.get_threshold() == before


@pytest.mark.parametrize("vocab_size", [65, 127, 255, 1023])
def test_every_token_of_a_run_counts_for_its_row(vocab_size):
    runs = torch.randint(vocab_size, (500, 5), generator=torch.Generator().manual_seed(0))
    rows = row_of(runs, vocab_size, 16384)
    for place in range(5):
        other = runs.clone()
        other[:, place] = (other[:, place] + 64) % vocab_size
        assert (row_of(other, vocab_size, 16384) == rows).float().mean() < 0.02


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_keep_memory_says_whether_it_can(monkeypatch):
    assert keep_memory() is True
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_memory() is False
