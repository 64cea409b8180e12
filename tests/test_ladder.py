"The bigram and attention chapters: measuring leaves no trace and counts every token, attention never looks ahead."
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nanogpt_nb.attention import Head, MultiHeadAttention
from nanogpt_nb.bigram import BigramLanguageModel, estimate_loss, evaluate, evaluating, fit

V = 7
quick = settings(max_examples=40, deadline=None)


class Reader(nn.Module):
    "A small model whose predictions depend on the whole context and on the place, with dropout."

    def __init__(self, block_size=6, dropout=0.5):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, 12), nn.Embedding(block_size, 12)
        self.attend = MultiHeadAttention(12, 3, block_size, dropout)
        self.frozen = nn.Dropout(dropout)
        self.lm_head = nn.Linear(12, V)

    def forward(self, idx, targets=None):
        x = self.tokens(idx) + self.places.weight[: idx.shape[1]]  # (B, T, C)
        logits = self.lm_head(self.frozen(x + self.attend(x)))  # (B, T, V)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def random_tokens(n, seed=0):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))


def cycle(n):
    "0 1 2 … V-1 0 1 …: a text that a bigram can learn to the letter."
    return torch.arange(n) % V


@pytest.fixture
def dataset():
    return SimpleNamespace(train=random_tokens(500, 1), val=random_tokens(200, 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Reader()


MEASURES = {
    "estimate_loss": lambda model, ds: estimate_loss(model, ds, batch_size=4, block_size=6, eval_iters=3),
    "evaluate": lambda model, ds: evaluate(model, ds.val, block_size=6, batch_size=5),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(model, dataset, measure, training):
    model.train(training)
    model.frozen.train(not training)  # one part in another mode than the rest
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    first, grad_mode = measure(model, dataset), torch.is_grad_enabled()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert grad_mode and all(p.grad is None for p in model.parameters())
    torch.rand(17)
    assert measure(model, dataset) == first


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_modes_come_back_after_an_error(model, dataset, measure):
    model.frozen.eval()
    modes = [m.training for m in model.modules()]
    dataset.train, dataset.val = dataset.train + V, dataset.val + V  # ids that no table has
    with pytest.raises(IndexError):
        measure(model, dataset)
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


def test_measuring_is_done_without_dropout(model, dataset):
    x, y = dataset.val[:6][None], dataset.val[1:7][None]
    assert not torch.equal(model(x, y)[0], model(x, y)[0])  # in training, chance has a part
    with evaluating(model):
        assert torch.equal(model(x, y)[0], model(x, y)[0]) and not model(x, y)[1].requires_grad


def test_another_seed_is_another_sample(model, dataset):
    def estimate(seed):
        return estimate_loss(model, dataset, 4, 6, 3, seed=seed)

    assert estimate(0) == estimate(0) != estimate(1)


def naive(model, tokens, block_size):
    "The loss of each token on its own, from the tokens of its window before it."
    losses = []
    with evaluating(model):
        for i in range(1, len(tokens)):
            start = (i - 1) // block_size * block_size
            logits, _ = model(tokens[None, start:i])
            losses.append(-logits[0, -1].double().log_softmax(-1)[tokens[i]].item())
    assert len(losses) == len(tokens) - 1
    return sum(losses) / len(losses)


@quick
@given(n=st.integers(2, 60), block_size=st.integers(1, 6), batch_size=st.integers(1, 9))
def test_evaluate_is_the_mean_over_every_token(n, block_size, batch_size):
    torch.manual_seed(n)
    model, tokens = Reader(), random_tokens(n, n)
    assert evaluate(model, tokens, block_size, batch_size) == pytest.approx(naive(model, tokens, block_size), abs=1e-5)


@pytest.mark.parametrize("n, divides", [(31, True), (33, False), (6, False), (7, True)])
def test_evaluate_with_and_without_a_short_last_window(model, n, divides):
    assert ((n - 1) % 6 == 0) is divides
    tokens = random_tokens(n)
    for batch_size in (1, 2, 64):
        assert evaluate(model, tokens, 6, batch_size) == pytest.approx(naive(model, tokens, 6), abs=1e-5)


def test_clear_errors_of_the_measures(model, dataset):
    with pytest.raises(ValueError, match="evaluate got 1 tokens and needs at least 2"):
        evaluate(model, dataset.val[:1], 6)
    with pytest.raises(ValueError, match="eval_iters is 0"):
        estimate_loss(model, dataset, 4, 6, 0)


def test_a_bigram_that_counted_reaches_the_entropy_of_the_pairs_and_none_is_lower():
    tokens = random_tokens(400, 3)
    counts = torch.zeros(V, V).index_put_((tokens[:-1], tokens[1:]), torch.tensor(1.0), accumulate=True)
    rows = counts.double() / counts.sum(1, keepdim=True)
    entropy = -(counts * rows.clamp(min=1e-300).log()).sum().item() / (len(tokens) - 1)
    model = BigramLanguageModel(V)
    model.token_embedding_table.weight.data = counts.clamp(min=1e-12).log()
    assert evaluate(model, tokens, 8) == pytest.approx(entropy, abs=1e-5)
    fit(model, SimpleNamespace(train=tokens, val=tokens), 50, 8, 8, 1e-2, eval_interval=50, eval_iters=1)
    assert evaluate(model, tokens, 8) > entropy


@quick
@given(vocab_size=st.integers(1, 30), batch=st.integers(1, 4), length=st.integers(1, 5), new=st.integers(0, 20))
def test_generate_gives_valid_ids_again_and_again(vocab_size, batch, length, new):
    torch.manual_seed(vocab_size)
    model = BigramLanguageModel(vocab_size)
    prompt = torch.randint(vocab_size, (batch, length))
    state = torch.get_rng_state()
    first, again = (model.generate(prompt, new, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (batch, length + new) and first.dtype == torch.int64
    assert torch.equal(first[:, :length], prompt)
    assert first.min() >= 0 and first.max() < vocab_size
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)


def test_generate_follows_the_table():
    model = BigramLanguageModel(V)
    model.token_embedding_table.weight.data = 100 * torch.eye(V).roll(1, dims=1)  # i is followed by i + 1
    assert model.generate(torch.tensor([[0], [3]]), 2 * V).tolist() == [[(s + t) % V for t in range(2 * V + 1)] for s in (0, 3)]


def test_generate_shows_the_model_its_context_and_no_more():
    class Fibonacci(nn.Module):
        context, generate = 2, BigramLanguageModel.generate

        def forward(self, idx, targets=None):
            assert idx.shape[1] <= self.context
            return 100.0 * F.one_hot(idx.cumsum(1) % V, V), None  # (B, T, V)

    assert Fibonacci().generate(torch.tensor([[0, 1]]), 8)[0].tolist() == [n % V for n in (0, 1, 1, 2, 3, 5, 8, 13, 21, 34)]


@pytest.mark.parametrize("prompt", [torch.zeros((1, 0), dtype=torch.long), torch.zeros(3, dtype=torch.long)])
def test_generate_needs_a_token_to_start_from(prompt):
    with pytest.raises(ValueError, match=r"at least one token\), got \("):
        BigramLanguageModel(V).generate(prompt, 1)


def test_fit_learns_a_text_that_a_table_can_hold():
    ds = SimpleNamespace(train=cycle(700), val=cycle(70))
    torch.manual_seed(0)
    history = fit(BigramLanguageModel(V), ds, 150, 8, 7, 0.1, eval_interval=60, eval_iters=4)
    assert [h["step"] for h in history] == [0, 60, 120, 150]
    assert history[0]["val_loss"] > 1 and history[-1]["val_loss"] < 0.05


def test_fit_depends_on_its_seed_alone_and_leaves_no_trace(dataset):
    def run(seed, eval_interval=5):
        torch.manual_seed(0)
        model = Reader()
        torch.manual_seed(len(runs))  # the chance outside differs each time
        state = torch.get_rng_state()
        history = fit(model, dataset, 10, 4, 6, 1e-2, eval_interval=eval_interval, eval_iters=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((history, torch.cat([p.detach().flatten() for p in model.parameters()])))
        return runs[-1]

    runs = []
    (first, w1), (again, w2), (_, other), (_, watched) = run(1), run(1), run(2), run(1, eval_interval=1)
    assert first == again and torch.equal(w1, w2)
    assert not torch.equal(w1, other)
    assert torch.equal(w1, watched)  # looking more often changes nothing


def test_the_batches_of_fit_do_not_depend_on_what_the_model_draws(dataset):
    def seen(dropout):
        class Recorder(Reader):
            def forward(self, idx, targets=None):
                if self.training:
                    batches.append(idx)
                return super().forward(idx, targets)

        batches = []
        fit(Recorder(dropout=dropout), dataset, 4, 4, 6, 1e-2, eval_interval=4, eval_iters=1)
        return torch.stack(batches)

    assert torch.equal(seen(0.0), seen(0.5))


def changes(layer, x, place, seed):
    "How much each place of the output (T,) moves when the input from `place` on is another."
    other = x.clone()
    other[:, place:] = torch.randn(other[:, place:].shape, generator=torch.Generator().manual_seed(seed))
    return (layer(other) - layer(x)).abs().amax(dim=(0, 2))


@quick
@given(data=st.data(), block_size=st.integers(2, 12), heads=st.integers(1, 4), seed=st.integers(0, 9999))
def test_the_future_never_changes_the_past(data, block_size, heads, seed):
    T = data.draw(st.integers(2, block_size), label="T")
    place = data.draw(st.integers(1, T - 1), label="place")
    torch.manual_seed(seed)
    x = torch.randn(2, T, 8 * heads)
    for layer in (Head(8 * heads, 5, block_size), MultiHeadAttention(8 * heads, heads, block_size)):
        moved = changes(layer, x, place, seed + 1)
        assert torch.equal(moved[:place], torch.zeros(place))
        assert (moved[place:] > 0).all()


def test_without_the_triangle_the_future_leaks():
    torch.manual_seed(0)
    head, x = Head(8, 8, 6), torch.randn(2, 6, 8)
    head.tril.fill_(True)
    assert (changes(head, x, 3, 1) > 0).all()


@quick
@given(heads=st.integers(1, 5), size=st.integers(1, 9), T=st.integers(1, 12), seed=st.integers(0, 9999))
def test_attention_equals_pytorchs(heads, size, T, seed):
    torch.manual_seed(seed)
    C = heads * size
    attend, x = MultiHeadAttention(C, heads, block_size=12), torch.randn(3, T, C)
    q, k, v = (torch.stack([getattr(h, name)(x) for h in attend.heads], 1) for name in ("query", "key", "value"))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, H)
    torch.testing.assert_close(attend.heads[0](x), theirs[:, 0])
    torch.testing.assert_close(attend(x), attend.proj(theirs.transpose(1, 2).flatten(2)))


def test_gradients_equal_pytorchs():
    torch.manual_seed(0)
    head, x = Head(8, 8, 6), torch.randn(2, 6, 8)
    ours = torch.autograd.grad(head(x).square().sum(), head.parameters())
    q, k, v = head.query(x), head.key(x), head.value(x)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, torch.autograd.grad(theirs.square().sum(), head.parameters()))


@pytest.mark.parametrize("layer", [Head(8, 4, block_size=6), MultiHeadAttention(8, 2, block_size=6)], ids=["Head", "MultiHeadAttention"])
def test_a_sequence_longer_than_block_size_is_a_clear_error(layer):
    assert layer(torch.randn(1, 6, 8)).shape[:2] == (1, 6)
    with pytest.raises(ValueError, match="The sequence has 7 tokens and block_size is 6: pass its last 6 tokens"):
        layer(torch.randn(1, 7, 8))


@pytest.mark.parametrize("n_embd, num_heads", [(10, 4), (10, 0)])
def test_heads_must_divide_the_channels(n_embd, num_heads):
    with pytest.raises(ValueError, match=f"n_embd is {n_embd} and num_heads is {num_heads}"):
        MultiHeadAttention(n_embd, num_heads, 6)


def test_dropout_acts_in_training_alone_on_the_weights_and_on_the_output():
    torch.manual_seed(0)
    x, output_only = torch.randn(2, 6, 8), MultiHeadAttention(8, 2, 6, dropout=0.5)
    for head in output_only.heads:
        head.dropout.p = 0.0
    for layer in (Head(8, 4, 6, dropout=0.5), output_only):
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_the_triangle_moves_with_the_model_and_stays_out_of_checkpoints():
    attend = MultiHeadAttention(8, 2, 6)
    names = {name for name, _ in attend.named_buffers()}
    assert names == {"heads.0.tril", "heads.1.tril"}
    assert names.isdisjoint(attend.state_dict())
