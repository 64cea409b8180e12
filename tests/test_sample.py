"Sampling: with and without the cache, the knobs, and the command."

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_nb.config import PRESETS, ConfigError, NanoGPTConfig
from nanogpt_nb.gpt import GPT
from nanogpt_nb.runs import RunError
from nanogpt_nb.sample import KVCache, generate, load_model, next_probs, pieces, sample
from nanogpt_nb.tokenizer import BPETokenizer, TokenizerError

TEXT = "ROMEO:\nBut, soft! what light through yonder window breaks?\n\nJULIET:\nO Romeo, Romeo! wherefore art thou Romeo? é ñ 😀\n" * 30


@pytest.fixture(scope="module")
def home(two_runs):
    return two_runs


def small(preset, **changes):
    torch.manual_seed(0)
    config = NanoGPTConfig.preset(preset).replace(n_layer=2, n_embd=24, num_heads=2, block_size=8, zero_init=False, **changes)
    return GPT(config, 20).eval()


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=15, deadline=None)
@given(prompt=st.integers(1, 20), new=st.integers(0, 30), batch=st.integers(1, 3), seed=st.integers(0, 99), top_k=st.none() | st.integers(1, 25))
def test_the_cache_changes_no_token(preset, prompt, new, batch, seed, top_k):
    model = small(preset)
    idx = torch.randint(20, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    with_cache, without = (
        generate(model, idx, new, top_k=top_k, use_cache=c, generator=torch.Generator().manual_seed(seed)) for c in (True, False)
    )
    assert torch.equal(with_cache, without) and with_cache.shape == (batch, prompt + new)


def test_up_to_a_full_window_it_is_the_lectures_generate():
    model, idx = small("lecture"), torch.zeros(2, 1, dtype=torch.long)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(8):
            probs = model(idx[:, -8:])[0][:, -1].softmax(-1)
            idx = torch.cat((idx, torch.multinomial(probs, 1, generator=g)), dim=1)
    assert torch.equal(generate(model, idx[:, :1], 8, generator=torch.Generator().manual_seed(3)), idx)


def test_sampling_leaves_the_model_and_the_random_numbers_alone():
    model = small("lecture", dropout=0.5).train()
    state = torch.get_rng_state()
    generate(model, torch.zeros(1, 1, dtype=torch.long), 5, generator=torch.Generator().manual_seed(0))
    assert model.training and model.blocks[0].sa.resid_dropout.training and torch.equal(state, torch.get_rng_state())


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.1, 3))
def test_the_knobs_keep_the_likeliest(logits, k, p, temperature):
    logits = torch.tensor([logits])
    plain = next_probs(logits, temperature)
    assert torch.allclose(plain.sum(), torch.tensor(1.0))
    by_k = next_probs(logits, temperature, top_k=k)
    scaled = (logits - logits.max()) / temperature  # numbers that differ may be the same after rounding: then both stay, or both go
    allowed = scaled >= scaled[0].sort(descending=True).values[min(k, logits.numel()) - 1]
    assert (by_k[~allowed] == 0).all() and (by_k[allowed & (plain > 0)] > 0).all()
    by_p = next_probs(logits, temperature, top_p=p)
    kept = plain[by_p > 0]
    assert kept.sum() >= p - 1e-5 and kept.sum() - kept.min() < p + 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-300, 1e-5])
def test_temperature_zero_is_greedy_and_so_is_next_to_it(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.equal(next_probs(logits, temperature), torch.tensor([[0.0, 1.0, 0.0]]))


def test_keys_and_values_never_move():
    cache = KVCache(1, NanoGPTConfig.preset("tiny"))
    at = cache.k.data_ptr()
    for _ in range(16):
        cache.append(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    assert cache.k.data_ptr() == at and cache.length == 16


@given(st.text(min_size=1, max_size=40))
def test_streamed_text_is_the_text(text):
    tokenizer = BPETokenizer.train(iter([TEXT]), 300)
    assert "".join(pieces(tokenizer.encode(text), tokenizer)) == tokenizer.decode(tokenizer.encode(text))


def test_samples_of_a_run(home):
    a, b = (sample("chars", "ROMEO:", 40, seed=s, runs_dir=home / "runs") for s in (1, 1))
    assert a == b and a[0].startswith("ROMEO:") and len(a[0]) == 46
    many = sample("chars", "ROMEO:", 20, num_samples=3, seed=1, runs_dir=home / "runs")
    assert len(set(many)) == 3 and all(len(t) == 26 for t in many)
    shown = []
    text = sample("pairs", "O ", 30, seed=2, runs_dir=home / "runs", show=shown.append)
    assert "".join(shown) == text[0] and len(shown) > 10
    assert sample("chars", seed=4, max_new_tokens=9, runs_dir=home / "runs") == sample("chars", seed=4, max_new_tokens=9, use_cache=False, runs_dir=home / "runs")


@pytest.mark.parametrize(
    "knob", [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5), dict(num_samples=0), dict(max_new_tokens=-1), dict(prompt="")]
)
def test_a_knob_that_is_set_wrong(knob, home):
    with pytest.raises(ConfigError):
        sample("chars", **{"runs_dir": home / "runs", **knob})


def test_a_character_that_the_model_does_not_know(home):
    with pytest.raises(TokenizerError, match="'ß'"):
        sample("chars", "Romeo ß", runs_dir=home / "runs")


def test_a_tokenizer_that_does_not_fit(home):
    run_dir = home / "runs" / "chars"
    kept = (run_dir / "tokenizer.json").read_text()
    (run_dir / "tokenizer.json").write_text((home / "runs" / "pairs" / "tokenizer.json").read_text())
    try:
        with pytest.raises(RunError, match="do not fit"):
            load_model("chars", runs_dir=home / "runs")
    finally:
        (run_dir / "tokenizer.json").write_text(kept)


def nanogpt(*words, home, **kwargs):
    command = [Path(sys.executable).parent / "nanogpt", *words]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def test_the_command_takes_its_prompt_from_anywhere(home):
    (home / "prompt.txt").write_text("JULIET:", encoding="utf-8")
    words = ["sample", "chars", "--tokens", "20", "--seed", "5"]
    typed = nanogpt(*words, "--prompt", "JULIET:", home=home)
    from_file = nanogpt(*words, "--prompt-file", "prompt.txt", home=home)
    piped = nanogpt(*words, "--prompt-file", "-", home=home, input="JULIET:")
    assert typed.returncode == 0, typed.stderr
    assert typed.stdout.startswith("JULIET:") and len(typed.stdout) == 28
    assert typed.stdout == from_file.stdout == piped.stdout


def test_the_command_says_what_is_wrong(home):
    for words, said in (
        (["sample", "chras"], "There is no run 'chras'"),
        (["sample", "chars", "--prompt", "ß"], "'ß'"),
        (["sample", "chars", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["sample", "chars", "--temperature", "-1"], "temperature=-1"),
        (["sample", "--runs-dir", "elsewhere"], "no runs in elsewhere"),
    ):
        done = nanogpt(*words, home=home)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)
        assert done.stdout == ""
