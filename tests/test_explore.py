"Exploring a trained model: its attention, next tokens and embedding, their pictures, and the widgets to play with."

import base64
import html
import io
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_nb.anatomy import (
    KINDS,
    attention_maps,
    attention_text,
    embedding_2d,
    embedding_text,
    habit,
    kind,
    next_logits,
    next_token_table,
    prompt_tokens,
    table_text,
    token_labels,
    visible,
)
from nanogpt_nb.config import PRESETS, ConfigError, NanoGPTConfig, NanoGPTError
from nanogpt_nb.explore import Panel, explore
from nanogpt_nb.gpt import GPT
from nanogpt_nb.playground import MAP_TOKENS, Playground
from nanogpt_nb.portrait import (
    LOOKS,
    MOST_POINTS,
    bars_html,
    embedding_svg,
    map_image,
    map_svg,
    map_thumb,
    place_labels,
    portrait,
    scale_html,
)
from nanogpt_nb.runs import RunError
from nanogpt_nb.sample import next_probs
from nanogpt_nb.tokenizer import BPETokenizer, CharTokenizer, TokenizerError

ROOT = Path(__file__).resolve().parents[1]
TEXT = (
    "ROMEO:\nBut, soft! what light through yonder window breaks? $x$ <&\"'> 3\n\nJULIET:\nO Romeo, Romeo! wherefore art thou Romeo? é 中 😀\n"
    * 30
)


@pytest.fixture(scope="module")
def runs(two_runs):
    return two_runs / "runs"


@pytest.fixture(params=["chars", "pairs"])
def play(runs, request):
    return Playground.of(request.param, runs)


def small(preset="cpu", vocab=20, **changes):
    torch.manual_seed(0)
    small = dict(n_layer=2, n_embd=24, num_heads=2, block_size=12, zero_init=False)
    return GPT(NanoGPTConfig.preset(preset).replace(**small | changes), vocab).eval()


def until(condition, seconds=240):
    "Wait until `condition()`."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


# Attention


@pytest.mark.parametrize(
    "changes", [{}, dict(qkv_bias=True), dict(qk_norm=True, position="rope"), dict(dropout=0.5), dict(num_heads=1)], ids=str
)
@pytest.mark.parametrize("preset", PRESETS)
def test_weights_times_values_is_what_every_layer_says(preset, changes):
    model = small(preset, **changes)
    for p in model.parameters():  # far from uniform attention, biases too
        torch.nn.init.normal_(p, std=0.3)
    seen = []
    hooks = [b.sa.register_forward_hook(lambda sa, args, out: seen.append((sa, args[0], out))) for b in model.blocks]
    idx = torch.randperm(20)[None, :10]  # other tokens, fewer than a head has numbers: no other weights give the same output
    with torch.no_grad():
        model(idx)
    for h in hooks:
        h.remove()
    maps = attention_maps(model, idx)
    heads = model.config.num_heads
    assert maps.shape == (2, heads, 10, 10) and len(seen) == 2
    for m, (sa, x, out) in zip(maps, seen):
        v = sa.qkv(x).chunk(3, -1)[2].view(10, heads, -1).transpose(0, 1)
        assert torch.linalg.matrix_rank(v).min() == 10
        assert torch.allclose(sa.proj((m @ v).transpose(0, 1).flatten(1)), out[0], atol=1e-5)
    assert torch.allclose(maps.sum(-1), torch.ones(2, heads, 10), atol=1e-5) and (maps.triu(1) == 0).all()
    assert maps.max() > 0.5


def test_maps_leave_the_model_as_it_was():
    model = small(dropout=0.5).train()
    idx = torch.randint(20, (1, 9))
    first = attention_maps(model, idx)
    assert model.training and model.blocks[0].sa.resid_dropout.training and not first.requires_grad
    assert torch.equal(first, attention_maps(model, idx[0]))
    with pytest.raises(ConfigError, match="13 tokens"):
        attention_maps(model, torch.zeros(13, dtype=torch.long))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_maps_are_right_while_another_thread_writes(play):
    idx = prompt_tokens(play.tokenizer, play.prompt)[:, -16:]
    right, done = attention_maps(play.model, idx), threading.Event()
    wrote = []
    writer = threading.Thread(target=lambda: wrote.extend(play.write("ROMEO", 10_000, stop=done.is_set)))
    writer.start()
    until(lambda: wrote)
    found = [attention_maps(play.model, idx) for _ in range(20)]
    done.set()
    writer.join()
    assert all(m.shape == right.shape and torch.allclose(m, right, atol=1e-6) for m in found)


def test_habits():
    T = 7
    before = torch.eye(T).roll(-1, 1)
    before[-1] = 0
    before = torch.cat([torch.eye(T)[:1], torch.eye(T)[:-1]])
    first = torch.zeros(T, T)
    first[:, 0] = 1
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    assert habit(torch.eye(T)) == "itself 100%" and habit(before) == "the token before 100%" and habit(first) == "the beginning 100%"
    assert habit(even) == "spread over 5.0 tokens, 2.0 back on average"
    assert habit(torch.ones(1, 1)) == habit(torch.eye(2)) == "too short to tell"


def test_a_map_in_words():
    m = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.001, 0.599, 0.4]])
    assert attention_text(m, ["a", "␣", "b"]).splitlines() == ["a looks at a 100%", "␣ looks at ␣ 75%, a 25%", "b looks at ␣ 60%, b 40%"]


# Tokens and their labels


def test_what_cannot_be_seen_has_a_sign():
    assert visible("a b\n\t\r") == "a␣b↵⇥␍" and visible("\x00") == "\\u0000" and visible("é中😀") == "é中😀"


def test_labels_of_byte_pairs():
    tokenizer = BPETokenizer.train(iter([TEXT]), 300)
    ids = tokenizer.encode("O Romeo é 中\n")
    labels = token_labels(tokenizer, ids)
    assert len(labels) == len(ids) and "␣Romeo" in labels and labels[-1] == "↵"
    assert any(re.fullmatch(r"#\d+", label) for label in token_labels(tokenizer, range(256)))  # bytes that are no character


def test_a_prompt_that_cannot_be():
    tokenizer = CharTokenizer("abc")
    assert prompt_tokens(tokenizer, "cab").tolist() == [[2, 0, 1]]
    with pytest.raises(ConfigError, match="empty"):
        prompt_tokens(tokenizer, "")
    with pytest.raises(TokenizerError, match="'d'"):
        prompt_tokens(tokenizer, "abd")


@given(st.text(max_size=4))
def test_every_token_has_a_kind_and_every_kind_a_look(text):
    assert kind(text) in KINDS
    assert set(KINDS) == set(LOOKS) and len({colour for colour, _, _ in LOOKS.values()}) == len({m for _, _, m in LOOKS.values()}) == len(
        KINDS
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("aeiouéа", "vowel"),
        ("bzñж", "consonant"),
        ("AÉЖ", "capital"),
        ("07", "digit"),
        (" \n,?-", "punctuation"),
        ("中א", "other"),
        ("\ufffd", "other"),
    ],
)
def test_kinds_of_characters(tokens, expected):
    assert {kind(c) for c in tokens} == {expected}


def test_kinds_of_byte_pairs():
    assert [
        kind(t) for t in ("th", " the", " The", "  ", " a", "42", ":\n", "")
    ] == "piece piece capital punctuation piece digit punctuation other".split()


# The next token


@settings(deadline=None)
@given(st.integers(1, 20), st.floats(0, 3), st.none() | st.integers(1, 25), st.none() | st.floats(0.05, 1))
def test_the_table_has_the_probabilities_that_text_is_drawn_from(n, temperature, top_k, top_p):
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(n))
    tokenizer = CharTokenizer("abcdefghijklmnopqrst")
    knobs = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    rows = next_token_table(logits, tokenizer, **knobs, n=n)
    drawn, own = next_probs(logits, **knobs)[0], logits.softmax(-1)[0]
    assert len(rows) == n
    for r in rows:
        assert r["probability"] == drawn[r["token"]] and r["own"] == own[r["token"]] and r["label"] == "abcdefghijklmnopqrst"[r["token"]]
    assert [r["token"] for r in rows] == own.argsort(descending=True).tolist()[:n]
    probabilities = [r["probability"] for r in rows]
    assert probabilities == sorted(probabilities, reverse=True)  # no knob changes the order


def test_the_last_tokens_decide():
    model = small()
    idx = torch.randint(20, (1, 30))
    with torch.no_grad():
        assert torch.equal(next_logits(model, idx), model(idx[:, -12:])[0][:, -1])


def test_a_model_that_is_broken_says_so():
    model = small()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RunError, match="not finite"):
        next_logits(model, torch.zeros(1, 1, dtype=torch.long))
    model.token_embedding.weight.data.fill_(torch.inf)
    with pytest.raises(RunError, match="not finite"):
        embedding_2d(model)


# The embedding


def test_the_embedding_is_seen_from_its_broadest_side():
    model = small(vocab=40)
    x = model.token_embedding.weight.detach().double()
    at, share = embedding_2d(model)
    spread, directions = torch.linalg.eigh(x.T.cov())
    assert torch.allclose(at.var(0), spread.flip(0)[:2]) and torch.allclose(share, spread.flip(0)[:2] / spread.sum())
    assert torch.allclose(at.abs(), ((x - x.mean(0)) @ directions.flip(1)[:, :2]).abs())
    assert all(column[column.abs().argmax()] > 0 for column in at.T)
    model.token_embedding.weight.data.neg_()
    assert torch.allclose(embedding_2d(model)[0].abs(), at.abs())


@pytest.mark.parametrize(("vocab", "n_embd"), [(1, 4), (2, 4), (5, 1), (3, 2)])
def test_the_embedding_of_next_to_nothing(vocab, n_embd):
    at, share = embedding_2d(small("tiny", vocab, n_embd=n_embd, num_heads=1))
    assert at.shape == (vocab, 2) and at.isfinite().all() and (0 <= share).all() and share.sum() <= 1 + 1e-9
    labels = list("abcde"[:vocab])
    drawn = embedding_svg(at, share, labels, ["vowel"] * vocab)
    assert drawn.count("<title>") == vocab and "nan" not in drawn
    assert len(embedding_text(at, labels).splitlines()) == vocab


def test_the_embedding_in_words():
    at = torch.tensor([[0.0, 0], [1, 0], [1.5, 0], [9, 0]])
    assert embedding_text(at, list("abcd"), most=1).splitlines() == [
        "a is nearest to b",
        "b is nearest to c",
        "c is nearest to b",
        "d is nearest to c",
    ]


# Pictures


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 700), st.floats(0, 400)), min_size=1, max_size=40), st.integers(1, 6))
def test_labels_cover_neither_each_other_nor_a_point(points, length):
    places = place_labels(points, ["x" * length] * len(points), 700)
    w, h = 7.5 * length, 12.0
    taken = [p for p in places if p is not None]
    for i, (x, y) in enumerate(taken):
        assert w / 2 <= x <= 700 - w / 2
        assert all(abs(x - u) >= w - 1e-6 or abs(y - v) >= h - 1e-6 for u, v in taken[:i])
        assert all(abs(x - u) >= w / 2 + 4 - 1e-6 or abs(y - v) >= h / 2 + 4 - 1e-6 for u, v in points)
    if len(points) == 1:
        assert len(taken) == 1


def pixels(png):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)


def test_a_map_is_brighter_where_there_is_more_and_empty_above_the_diagonal():
    m = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.0, 0.2, 0.8, 0], [0.05, 0.1, 0.25, 0.6]])
    drawn = pixels(map_image(m))
    assert drawn.shape == (4, 4, 4) and ((drawn[..., 3] == 255) == np.tri(4, dtype=bool)).all()
    bright = drawn[..., :3] @ (0.2126, 0.7152, 0.0722)
    values, light = m.numpy()[np.tri(4, dtype=bool)], bright[np.tri(4, dtype=bool)]
    assert all((light[i] > light[j]) == (values[i] > values[j]) for i in range(10) for j in range(10))


LABELS = ["<", "&", '"', "'", "␣", "a"]


@pytest.mark.parametrize("labels", [LABELS, [label * 3 for label in LABELS]], ids=["characters", "pieces"])
def test_html_is_whole_whatever_the_tokens_are(labels):
    m = torch.eye(6)
    tree = ElementTree.fromstring(map_svg(m, labels, 'the "first" <head>'))
    assert [t.text for t in tree.iter("text")] == labels * 2 and tree.find("svg").get("aria-label") == 'the "first" <head>: itself 100%'
    at = torch.arange(12.0).view(6, 2)
    tree = ElementTree.fromstring(embedding_svg(at, torch.tensor([0.5, 0.2]), labels, ["punctuation"] * 5 + ["vowel"]))
    assert [t.text for t in tree.iter("title")] == [f"{label} (punctuation)" for label in labels[:5]] + [f"{labels[5]} (vowel)"]
    rows = [dict(token=i, label=label, probability=p, own=0.15) for i, (label, p) in enumerate(zip(labels, (0.4, 0.3, 0.2, 0.1, 0, 0)))]
    tree = ElementTree.fromstring(f"<div>{bars_html(rows, 9)}</div>")
    assert [t.text for t in tree.iter("th")] == labels and "".join(tree.itertext()).count("left out") == 2
    assert ElementTree.fromstring(scale_html()) is not None and 'alt="&lt;b&gt;: itself' in map_thumb(m, "<b>")


def test_bars_are_as_long_as_their_probabilities():
    rows = [dict(token=0, label="a", probability=0.4, own=0.2), dict(token=1, label="b", probability=0.1, own=0.05)]
    bars = [float(w) for w in re.findall(r"width:([\d.]+)%;height:100%", bars_html(rows, 5))]
    assert bars == [80.0, 20.0]  # of an axis up to 50%
    assert "3 other tokens: 50.0%" in bars_html(rows, 5) and "other" not in bars_html(rows, 2)


def test_a_large_vocabulary_is_drawn_in_part():
    at = torch.randn(3000, 2)
    drawn = embedding_svg(at, torch.tensor([0.1, 0.1]), [f"#{i}" for i in range(3000)], ["other"] * 3000)
    assert drawn.count("<title>") == MOST_POINTS and f"{MOST_POINTS} of 3000 tokens" in drawn and len(drawn) < 100_000


def test_a_portrait(play):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = portrait(play.model, play.tokenizer, "ROMEO: 中 $x$ <", "But\n中 $\x1a", 1, 1, temperature=0.5, top_k=5)
    drawn = pixels(png)
    assert drawn.shape[0] > 500 and (drawn[..., 3] == 255).all() and len(png) < 60_000
    assert all(
        (abs(drawn[..., :3] - rgb) <= 12).all(-1).any()
        for rgb in [(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)]
    )


# The playground


def test_a_playground_of_each_kind_of_run(play):
    labels, maps, logits = play.look()
    assert maps.shape[2] == len(labels) <= 16 and logits.shape == (1, play.tokenizer.vocab_size)
    assert "".join(play.write("ROMEO", 20, seed=1)) == "".join(play.write("ROMEO", 20, seed=1)) != "".join(play.write("ROMEO", 20, seed=2))
    play.knobs["temperature"] = 0
    assert "".join(play.write("ROMEO", 20, seed=1)) == "".join(play.write("ROMEO", 20, seed=2))
    assert [r["probability"] for r in play.next_tokens(2)] == [1, 0]
    words = repr(play)
    assert play.prompt in words and "layer 1, head 1" in words and table_text(play.next_tokens(1)) in words
    assert len(play.embedding()[2]) == play.tokenizer.vocab_size


def test_the_first_prompt_is_one_that_the_model_can_read(runs, tmp_path):
    for name in ("chars", "pairs"):
        assert Playground.of(name, runs).prompt.strip()
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / "copy"
    subprocess.run(["cp", "-r", runs / "chars", copy], check=True)
    (copy / "samples.txt").write_text("--- step 0\nß ß\n", encoding="utf-8")
    assert Playground.of(copy).prompt == "\n"
    (copy / "samples.txt").unlink()
    assert Playground.of(copy).prompt == "\n"


def test_a_long_prompt_is_looked_at_from_its_end():
    model = small("lecture", vocab=3, block_size=100)
    play = Playground(None, model, CharTokenizer("abc"), "ab" * 60 + "c" * 40)
    labels, maps, logits = play.look()
    assert len(labels) == maps.size(-1) == MAP_TOKENS and labels[-40:] == ["c"] * 40
    assert torch.equal(logits, next_logits(model, prompt_tokens(play.tokenizer, play.prompt)))


def test_runs_that_are_not_there(runs, tmp_path):
    with pytest.raises(RunError, match="no runs"):
        explore(runs_dir=tmp_path)
    with pytest.raises(RunError, match="chars"):
        explore("char", runs)
    with pytest.raises(TokenizerError, match="U\\+00DF"):
        explore("chars", runs, prompt="ß")


def test_in_a_terminal_it_is_text_and_needs_no_notebook(runs):
    code = "from nanogpt_nb.explore import explore; print(explore('chars')); import sys; print(*sys.modules, file=sys.stderr)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs.parent, capture_output=True, text=True, encoding="utf-8", env=env, timeout=300
    )
    assert done.returncode == 0 and done.stdout.startswith("chars: ") and "The next token:" in done.stdout
    assert not {"IPython", "ipywidgets", "matplotlib"} & {m.partition(".")[0] for m in done.stderr.split()}


# The panel


@pytest.fixture
def panel(runs):
    panel = Panel(Playground.of("chars", runs, prompt="ROMEO:\nBut"))
    yield panel
    panel.job.set()


def shown(panel):
    "The text on the panel, as it is read."
    found = re.search("<pre.*?</pre>", panel.text.value, re.S)
    return html.unescape(re.sub("<[^>]*>", "", found[0])).rstrip("▌") if found else ""


def said(panel):
    return re.search(r'role="status"[^>]*>(.*?)&nbsp;', panel.text.value, re.S)[1] if panel.text.value else ""


def test_the_bars_follow_the_sliders(panel):
    before = panel.bars.value
    panel.temperature.value = 0.1
    sharper = panel.bars.value
    panel.top_k.value = 2
    assert len({before, sharper, panel.bars.value}) == 3 and panel.bars.value.count("left out") == 10
    panel.top_k.value = panel.top_k.max
    panel.top_p.value = 0.05
    assert panel.play.knobs == dict(temperature=0.1, top_k=None, top_p=0.05) and panel.bars.value.count("left out") == 11
    panel.top_p.value = 1
    panel.temperature.value = 0.8
    assert panel.bars.value == before


def test_the_maps_follow_the_prompt_the_layer_and_the_head(panel):
    assert panel.large.value.count("<text") == 2 * len("ROMEO:\nBut")
    panel.prompt.value = "JULIET"
    assert panel.large.value.count("<text") == 12 and "layer 0, head 0" in panel.large.value
    thumbs = [t.value for t in panel.thumbs]
    panel.layer.value = 1
    panel.heads[1].click()
    assert "layer 1, head 1" in panel.large.value and all(t.value != was for t, was in zip(panel.thumbs, thumbs))
    assert [b.button_style for b in panel.heads] == ["", "primary"]
    assert "J looks at J 100%" in panel.large.value


def test_a_prompt_that_the_model_cannot_read_is_told_and_changes_nothing_else(panel):
    bars, large = panel.bars.value, panel.large.value
    panel.prompt.value = "RÖMEO"
    assert "U+00D6" in panel.message.value and (panel.bars.value, panel.large.value) == (bars, large)
    panel.prompt.value = ""
    assert "empty" in panel.message.value and panel.play.prompt == "ROMEO:\nBut"
    panel.prompt.value = "R"
    assert panel.message.value == "" and panel.play.prompt == "R"


def test_choosing_the_next_token_oneself(panel):
    for i in (0, 3):
        label, before = panel.choices[i].description, panel.play.prompt
        panel.choices[i].click()
        assert panel.prompt.value == panel.play.prompt and visible(panel.play.prompt) == visible(before) + label


def test_the_embedding_is_drawn_when_it_is_asked_for(panel):
    assert panel.points.value == ""
    panel.tabs.selected_index = 1
    drawn = panel.points.value
    assert drawn.count("<title>") == panel.play.tokenizer.vocab_size and "is nearest to" in drawn


def test_text_is_written_and_gone_on_with(panel):
    panel.tokens.value = 50
    panel.start.click()
    until(lambda: said(panel).startswith("50 tokens"))
    first = shown(panel)
    assert first.startswith("ROMEO:\nBut") and len(first) == 10 + 50 and panel.stop.disabled
    panel.more.click()
    until(lambda: len(shown(panel)) == 10 + 100 and said(panel))
    assert shown(panel).startswith(first) and "<b>ROMEO:\nBut</b>" in panel.text.value


def test_text_is_stopped(panel):
    panel.tokens.value = panel.tokens.max
    panel.start.click()
    until(lambda: len(panel.written) > 12)
    assert not panel.stop.disabled and panel.more.disabled
    panel.stop.click()
    until(lambda: said(panel))
    assert 12 < len(shown(panel)) < panel.tokens.max and panel.stop.disabled and not panel.more.disabled


def test_a_new_beginning_ends_the_one_before(panel):
    panel.tokens.value = panel.tokens.max
    panel.start.click()
    until(lambda: len(panel.written) > 12)
    old, threads = panel.job, threading.active_count()
    panel.prompt.value = "JULIET:"
    panel.tokens.value = 50
    panel.start.click()
    until(lambda: said(panel).startswith("50 tokens"))
    assert old.is_set() and shown(panel).startswith("JULIET:") and len(shown(panel)) == 57
    until(lambda: threading.active_count() < threads)
    assert shown(panel).startswith("JULIET:")


def test_a_model_that_breaks_while_writing_says_so(panel):
    panel.play.model.lm_head.weight.data.fill_(torch.nan)
    panel.start.click()
    until(lambda: "not finite" in said(panel))
    assert panel.stop.disabled


def test_text_shows_as_it_was_written(runs):
    panel = Panel(Playground.of("chars", runs, prompt="<&\"'> 3"))
    panel.show(panel.job, "<&\"'> 3\n<b>", "done")
    assert shown(panel) == "<&\"'> 3\n<b>"


def test_a_notebook_is_given_widgets_picture_and_text(play, monkeypatch):
    forms = play._repr_mimebundle_()
    assert forms["text/plain"] == repr(play) and pixels(base64.b64decode(forms["image/png"])).ndim == 3
    assert forms["application/vnd.jupyter.widget-view+json"]["model_id"] == play.panel.box.model_id
    until(lambda: shown(play.panel).startswith(play.prompt) and len(shown(play.panel)) > len(play.prompt) + 1)  # writes by itself
    panel = play.panel
    play._repr_mimebundle_()
    assert play.panel is panel
    panel.job.set()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert sorted(Playground(play.run, play.model, play.tokenizer, "ROMEO")._repr_mimebundle_()) == ["image/png", "text/plain"]


def test_without_matplotlib_there_are_words_that_say_what_to_install(play, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NanoGPTError, match="The picture needs matplotlib"):
        play.picture()
    forms = play._repr_mimebundle_()
    assert list(forms) == ["text/plain"] and forms["text/plain"].startswith(repr(play)) and "pip install matplotlib" in forms["text/plain"]


def test_the_process_ends_in_peace_while_text_is_written(runs):
    code = "from nanogpt_nb.explore import explore; p = explore('chars'); p._repr_mimebundle_(); p.panel.tokens.value = 2000; p.panel.on_write()"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.parent, capture_output=True, text=True, env=env, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
