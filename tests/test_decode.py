"Decoding with shapes that never change: the same text as the plain loop."

import copy
import warnings

import pytest
import torch
from pretend_cuda import Graph, pretend_cuda

from nanogpt_nb import decode
from nanogpt_nb.config import PRESETS, NanoGPTConfig
from nanogpt_nb.decode import CHUNK, Decoder, StaticCache, agree, decoder_for, draw, logits_at
from nanogpt_nb.gpt import GPT
from nanogpt_nb.runs import RunError
from nanogpt_nb.sample import generate, stream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
KNOBS = (1.0, None, None)


def small(preset: str, block_size=8, device="cpu", **changes) -> GPT:
    torch.manual_seed(0)
    config = NanoGPTConfig.preset(preset).replace(
        n_layer=2, n_embd=24, num_heads=2, block_size=block_size, zero_init=False, ngram_rows=300, **changes
    )
    model = GPT(config, 20).eval()
    for table in model.ngram_embedding.tables if model.ngram_embedding else ():
        torch.nn.init.normal_(table.weight)
    return model.to(device)


def seeded(seed: int, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def prompt(T: int, batch: int = 2, device="cpu"):
    return torch.randint(20, (batch, T), generator=seeded(T)).to(device)


VARIANTS = [(p, {}) for p in PRESETS] + [("modern", dict(ngrams=n)) for n in (2, 4)]


@pytest.mark.parametrize("preset, changes", VARIANTS, ids=str)
def test_the_logits_are_those_of_the_model(preset, changes):
    model, seen = small(preset, **changes), prompt(9)
    for T in (1, 5, 7):
        caches = [StaticCache(2, model.config) for _ in model.blocks]
        with torch.no_grad():
            whole = model(seen[:, :8])[0]
            model(seen[:, :T], cache=caches)
        for at in range(T, 8):
            ours = logits_at(model, seen, torch.tensor([at]), caches)
            assert torch.allclose(ours, whole[:, at], atol=1e-4)
            assert not torch.allclose(ours, whole[:, at - 1], atol=1e-3)  # sharp: another position has others


def test_places_that_are_not_written_yet_do_not_count():
    model, seen = small("modern"), prompt(9)
    caches = [StaticCache(2, model.config) for _ in model.blocks]
    clean = logits_at(model, seen, torch.tensor([0]), caches)
    for cache in caches:
        cache.k[:, :, 1:], cache.v[:, :, 1:] = 7.0, -3.0
    assert torch.allclose(logits_at(model, seen, torch.tensor([0]), caches), clean, atol=1e-5)


@pytest.mark.parametrize("preset, changes", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "T, n, knobs", [(1, 37, KNOBS), (8, 9, (0.7, 5, None)), (12, 20, (0.0, None, None)), (3, 1, (1.0, None, 0.8))], ids=str
)
def test_the_text_is_that_of_the_plain_loop(preset, changes, T, n, knobs):
    model, idx, g = small(preset, **changes), prompt(T, 3), [seeded(5), seeded(5)]
    plain = list(stream(model, idx, n, *knobs, generator=g[0]))
    ours = list(Decoder(model, 3, knobs).write(model, idx, n, g[1]))
    assert {t.shape for t in ours} == {(3, 1)} and torch.equal(torch.cat(plain, 1), torch.cat(ours, 1))
    assert torch.equal(g[0].get_state(), g[1].get_state())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_windows_of_any_size(size):
    model, idx = small("lecture", block_size=size), prompt(2)
    plain = torch.cat(list(stream(model, idx, 11, generator=seeded(1))), 1)
    assert torch.equal(torch.cat(list(Decoder(model, 2).write(model, idx, 11, seeded(1))), 1), plain)
    assert list(Decoder(model, 2).write(model, idx, 0, seeded(1))) == []


def test_a_decoder_can_be_used_again_and_again():
    "Also after weights that changed in place, as they do in training."
    model, decoder = small("modern"), Decoder(small("modern"), 2)
    for i in range(3):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        ours = torch.cat(list(decoder.write(model, prompt(3 + i), 30, seeded(i))), 1)
        assert torch.equal(ours, torch.cat(list(stream(model, prompt(3 + i), 30, generator=seeded(i))), 1))


def test_the_random_numbers_of_nobody_are_used_when_one_gives_his_own():
    model, before = small("lecture"), torch.get_rng_state()
    list(Decoder(model, 2).write(model, prompt(3), 20, seeded(1)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    plain = torch.cat(list(stream(model, prompt(3), 20)), 1)
    torch.manual_seed(4)
    assert torch.equal(torch.cat(list(Decoder(model, 2).write(model, prompt(3), 20)), 1), plain)


def test_drawing_is_multinomial():
    probs = torch.randn(50, 20, generator=seeded(0)).mul(4).softmax(-1)
    probs[:, 3] = 0
    for seed in range(20):
        a, b = seeded(seed), seeded(seed)
        assert torch.equal(draw(probs, a), torch.multinomial(probs, 1, generator=b)) and torch.equal(a.get_state(), b.get_state())
    assert not (draw(probs) == 3).any()


def test_text_comes_in_chunks_and_at_once_when_it_is_there():
    model = small("lecture", block_size=128)
    decoder, steps = Decoder(model, 1), []
    real = decoder.body
    decoder.body = lambda m: (steps.append(1), real(m))
    new = decoder.write(model, prompt(1, 1), 100, seeded(0))
    next(new)
    assert len(steps) < 2 * CHUNK  # the next chunk is on its way, the one after is not
    assert len(list(new)) == 99 and len(steps) == 99


def test_weights_that_are_no_numbers_are_told():
    model = small("modern")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    decoder = Decoder(model, 1)
    with pytest.raises(RunError, match="not finite"):
        list(decoder.write(model, prompt(1, 1), 20, seeded(0)))
    good = small("modern")
    assert len(list(decoder.write(good, prompt(1, 1), 20, seeded(0)))) == 20 and not decoder.busy


def test_one_decoder_a_model_and_setting(monkeypatch):
    made = []
    monkeypatch.setattr(Decoder, "record", lambda self, model: made.append(self))
    model = small("lecture")
    one = decoder_for(model, 1, KNOBS, 100)
    assert one is made[0] and decoder_for(model, 1, KNOBS, 1) is one  # made already: good for a single token
    assert decoder_for(model, 2, KNOBS, CHUNK) is None and len(made) == 1  # too little to record for
    assert decoder_for(model, 1, (0.5, None, None), 100) is made[1]
    one = decoder_for(model, 1, KNOBS, 100)
    writing = one.write(model, prompt(1, 1), 80, seeded(0))
    next(writing)
    assert decoder_for(model, 1, KNOBS, 100) is not one  # in use
    writing.close()
    assert not one.busy
    assert decoder_for(copy.deepcopy(model), 1, KNOBS, 100) is made[-1] and len(decode._DECODERS) >= 2


def test_a_model_that_is_let_go_takes_its_decoder_along(monkeypatch):
    monkeypatch.setattr(Decoder, "record", lambda self, model: None)
    before = len(decode._DECODERS)
    model = small("lecture")
    assert decoder_for(model, 1, KNOBS, 100) and len(decode._DECODERS) == before + 1
    del model
    assert len(decode._DECODERS) == before


def test_what_cannot_be_recorded_is_told_once(monkeypatch):
    def fails(self, model):
        raise RuntimeError("CUDA error: out of luck\nmore lines")

    monkeypatch.setattr(Decoder, "record", fails)
    model, said = small("lecture"), []
    assert [decoder_for(model, 1, KNOBS, 100, said.append) for _ in range(3)] == [None] * 3
    assert len(said) == 1 and "going on without: CUDA error: out of luck" in said[0] and "\n" not in said[0]
    with pytest.warns(UserWarning, match="out of luck"):
        decoder_for(small("lecture"), 1, KNOBS, 100)


def test_a_recording_has_to_do_the_same():
    model = small("lecture")
    decoder = Decoder(model, 2)
    expected = decoder.rehearse(model)
    agree(decoder.rehearse(model), expected)
    wrong = [(expected[0] + 0.1, *expected[1:]), (expected[0] * torch.nan, *expected[1:]), (expected[0], expected[1] + 1, expected[2])]
    for got, said in zip([*wrong, (*expected[:2], expected[2] + 1)], ["probability", "probability", "position", "random"], strict=True):
        with pytest.raises(RunError, match=said):
            agree(got, expected)


def test_the_way_of_recording_and_playing(monkeypatch):
    "All but CUDA itself."
    model = small("modern", ngrams=3)
    decoder = Decoder(model, 2)
    pretend_cuda(monkeypatch, lambda: decoder.body(model))
    decoder.record(model)
    (graph,) = Graph.made
    assert decoder.graph is graph and graph.generators == [decoder.generator] and graph.played == 1
    ours = torch.cat(list(decoder.write(model, prompt(3), 30, seeded(2))), 1)
    assert torch.equal(ours, torch.cat(list(stream(model, prompt(3), 30, generator=seeded(2))), 1))
    assert graph.played > 20


@pytest.mark.parametrize("fails", [RuntimeError("broke off"), None], ids=str)
def test_a_recording_that_goes_wrong_is_not_used(fails, monkeypatch):
    model, said = small("modern"), []
    here, set_to = pretend_cuda(monkeypatch, lambda: None, fails=fails)
    assert decoder_for(model, 1, KNOBS, 100, said.append) is None
    assert len(said) == 1 and ("broke off" if fails else "played back") in said[0] and set_to == ([here] if fails else [])


def test_tokens_are_on_the_host_and_texts_where_the_prompt_is():
    model = small("lecture")
    assert {t.device.type for t in stream(model, prompt(2), 3)} == {"cpu"}
    assert generate(model, prompt(2), 3).device == prompt(2).device


# On a GPU


@needs_gpu
@pytest.mark.parametrize("preset, changes", VARIANTS, ids=str)
@pytest.mark.parametrize("knobs", [KNOBS, (0.0, None, None), (0.8, 5, 0.9)], ids=str)
def test_played_back_it_writes_the_same(preset, changes, knobs):
    model, idx = small(preset, block_size=64, device="cuda", **changes), prompt(3, 2, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = torch.cat(list(stream(model, idx, 100, *knobs, generator=seeded(1, "cuda"))), 1)
    assert decode._DECODERS[model][1].graph
    plain = torch.cat(list(stream(model, idx, 100, *knobs, generator=seeded(1, "cuda"), use_cache=False)), 1)
    assert torch.equal(ours[:, :20], plain[:, :20])
    again = torch.cat(list(stream(model, idx, 100, *knobs, generator=seeded(1, "cuda"))), 1)
    assert torch.equal(again, ours)


@needs_gpu
def test_weights_that_changed_are_read_by_the_recording():
    model, idx = small("modern", device="cuda"), prompt(3, 2, "cuda")
    first = torch.cat(list(stream(model, idx, 60, 0.0)), 1)
    decoder = decode._DECODERS[model][1]
    with torch.no_grad():
        model.lm_head.weight.neg_()
    second = torch.cat(list(stream(model, idx, 60, 0.0)), 1)
    assert decode._DECODERS[model][1] is decoder and not torch.equal(first, second)
    assert torch.equal(second, torch.cat(list(stream(model, idx, 60, 0.0, use_cache=False)), 1))


@needs_gpu
def test_a_token_waits_for_nothing():
    model = small("modern", device="cuda")
    decoder, idx = decoder_for(model, 2, (0.8, 5, 0.9), 100), prompt(1, 2, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.fill(model, idx)
        for _ in range(3):
            decoder.run(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decoder.at.item() == 4 and decoder.sound
