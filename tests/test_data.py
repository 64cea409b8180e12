"Texts to batches: prepared once, in little memory, whole or not at all; batches as in the lecture."

import errno
import json
import os
import signal

import numpy as np
import pytest
import torch
from data_fixtures import cache, finish, one_sentence, plays, python  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import nanogpt_nb.data as data_module
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.corpus import SHAKESPEARE_CHARS, CorpusError
from nanogpt_nb.data import Dataset, get_batch, load_dataset, prepare, windows
from nanogpt_nb.tokenizer import TokenizerError


@pytest.fixture
def book(tmp_path):
    "A text file of 20,000 characters with accents and emoji."
    path = tmp_path / "book.txt"
    path.write_text("Où est la scène? 🎭 To be, or not.\n" * 600)
    return path


def folders(cache): return sorted(p.name for p in (cache / "tokens").iterdir() if p.is_dir())  # noqa: F811


def seeded(seed=1337): return torch.Generator().manual_seed(seed)


@pytest.fixture
def on_disk(monkeypatch):
    "No text is small."
    monkeypatch.setattr(data_module, "IN_MEMORY", 0)


# ---- prepare

def test_tiny_shakespeare_is_the_lectures_split(plays):  # noqa: F811
    d = prepare(progress=False)
    assert isinstance(d, Dataset) and d.corpus.name == "tinyshakespeare" and d.corpus.sha256 == plays.sha256 and d.corpus.note == plays.note
    assert d.train.dtype == torch.int64 and len(d.train) == 1_003_854 and len(d.val) == 111_540
    assert d.train[:10].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47]
    assert d.tokenizer.chars == SHAKESPEARE_CHARS and d.tokenizer.decode(torch.cat([d.train, d.val])) == plays.text()


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_prepared_is_the_text(cache, book, tokenizer):  # noqa: F811
    d = prepare((book,), tokenizer=tokenizer, bpe_vocab_size=300)
    assert d.tokenizer.decode(torch.cat([d.train, d.val])) == book.read_text()
    assert len(d.train) == int(0.9 * (len(d.train) + len(d.val))) and torch.cat([d.train, d.val]).max() < d.tokenizer.vocab_size
    assert repr(d).startswith("Dataset(book: ") and "<table>" in d._repr_html_() and str(book.parent) not in d._repr_html_()


def test_on_the_disk_is_the_same(cache, book, monkeypatch):  # noqa: F811
    small = prepare((book,))
    monkeypatch.setattr(data_module, "IN_MEMORY", 0)
    large = prepare((book,))
    assert isinstance(large.train, np.memmap) and large.train.dtype == np.uint16
    assert large.train.tolist() == small.train.tolist() and large.val.tolist() == small.val.tolist()
    assert "<table>" in large._repr_html_()
    with pytest.raises(ValueError): large.train[0] = 1


def test_more_than_65536_characters(cache, tmp_path, on_disk):  # noqa: F811
    text = "".join(chr(0x20000 + i) for i in range(66_000)) * 2
    (tmp_path / "many.txt").write_text(text)
    d = prepare((tmp_path / "many.txt",))
    assert d.train.dtype == np.uint32 and d.tokenizer.decode(np.concatenate([d.train, d.val])) == text


@settings(max_examples=25, deadline=None)
@given(text=st.lists(st.sampled_from(["a", "é", "🎭", "\r\n", "\r", "\n", "b "]), min_size=30, max_size=60).map("".join), size=st.integers(1, 7), kind=st.sampled_from(["char", "bpe"]))
def test_chunks_make_no_difference(tmp_path_factory, text, size, kind):
    "However the stream is cut, the tokens are those of the whole text."
    from nanogpt_nb.corpus import Corpus
    folder = tmp_path_factory.mktemp("chunks")
    (folder / "t.txt").write_bytes(text.encode())
    corpus = Corpus("t", (folder / "t.txt",))
    bar = data_module._bar(0, "", False)
    whole = data_module._train_tokenizer(corpus, kind, 260, bar)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Corpus, "chunks", lambda self, size_=None, tell=None, chunks=Corpus.chunks: chunks(self, size, tell))
        tok = data_module._train_tokenizer(corpus, kind, 260, bar)
        with open(folder / "ids", "wb") as f: n = data_module._encode_into(f, corpus, tok, bar)
    assert tok == whole
    ids = np.fromfile(folder / "ids", tok.dtype)
    assert len(ids) == n and ids.tolist() == whole.encode(corpus.text()).tolist()


def test_load_dataset_reads_the_config(cache, book):  # noqa: F811
    d = load_dataset(NanoGPTConfig(data=(str(book),), tokenizer="bpe", bpe_vocab_size=280, block_size=16))
    assert d.tokenizer.vocab_size == 280
    with one_sentence(CorpusError, "block_size=4000"): load_dataset(NanoGPTConfig(data=(str(book),), block_size=4000))
    book.write_bytes("Où est le café? ".encode("cp1252") * 100)
    assert load_dataset(NanoGPTConfig(data=(str(book),), encoding="cp1252", block_size=16)).tokenizer.decode([0]) == " "


# ---- what can be wrong

def test_texts_that_cannot_be_learned(cache, tmp_path):  # noqa: F811
    path = tmp_path / "t.txt"
    for content in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        with one_sentence(CorpusError, "empty"): prepare((path,))
    for kind in ("char", "bpe"):
        path.write_text("a" * 200_000)
        with one_sentence(CorpusError, "one distinct character ('a')"): prepare((path,), tokenizer=kind)
    path.write_text("to be or not")
    with one_sentence(CorpusError, "12 tokens", "block_size=8", "at most 1"): prepare((path,), block_size=8)
    path.write_text("ab")
    with one_sentence(CorpusError, "2 tokens", "longer text"): prepare((path,))
    with one_sentence(CorpusError, "'words'", "char or bpe"): prepare((path,), tokenizer="words")
    with one_sentence(TokenizerError, "100"): prepare((path,), tokenizer="bpe", bpe_vocab_size=100)
    path.write_bytes(b"text \xff text" * 10)
    with one_sentence(CorpusError, "byte offset 5", "--encoding"): prepare((path,))
    assert not (cache / "tokens").exists() or folders(cache) == folders_that_are_whole(cache)


def folders_that_are_whole(cache):  # noqa: F811
    return [f for f in folders(cache) if data_module._open_folder(cache / "tokens" / f)]


@pytest.mark.parametrize("n", [2570, 2569, 2561, 2560])
def test_too_short_for_a_block_exactly(cache, tmp_path, n):  # noqa: F811
    "What passes can make a batch from both splits, what is refused cannot."
    (tmp_path / "t.txt").write_text("ab" * (n // 2) + "a" * (n % 2))
    if n - int(0.9 * n) > 256:
        d = prepare((tmp_path / "t.txt",), block_size=256)
        for split in (d.train, d.val): assert get_batch(split, 2, 256)[0].shape == (2, 256)
    else:
        with one_sentence(CorpusError, "block_size=256", f"at most {n - int(0.9 * n) - 1}"): prepare((tmp_path / "t.txt",), block_size=256)
        d = prepare((tmp_path / "t.txt",), block_size=n - int(0.9 * n) - 1)
        with one_sentence(CorpusError, "256"): get_batch(d.val, 2, 256)


def test_full_disk(cache, book, monkeypatch):  # noqa: F811
    def full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(data_module.os, "fsync", full)
    with one_sentence(CorpusError, "No space left", "NANOGPT_NB_CACHE"): prepare((book,))
    assert folders(cache) == []


# ---- the cache

def reads(monkeypatch):
    "A list that grows with each preparation."
    calls, real = [], data_module._prepare_folder
    monkeypatch.setattr(data_module, "_prepare_folder", lambda *a: (calls.append(1), real(*a))[1])
    return calls


def test_reused_when_nothing_changed(cache, book, monkeypatch):  # noqa: F811
    calls = reads(monkeypatch)
    first, again = prepare((book,)), prepare((book,))
    assert len(calls) == 1 and torch.equal(first.train, again.train) and again.tokenizer == first.tokenizer and again.corpus.sha256 == first.corpus.sha256
    for n, change in enumerate((dict(tokenizer="bpe"), dict(tokenizer="bpe", bpe_vocab_size=270), dict(encoding="latin-1")), 2):
        prepare((book,), **change)
        prepare((book,), **change)
        assert len(calls) == n
    prepare((book,), bpe_vocab_size=999)                 # says nothing to characters
    assert len(calls) == 4


def test_a_changed_file_is_prepared_anew_and_the_old_goes(cache, book, monkeypatch):  # noqa: F811
    calls = reads(monkeypatch)
    old = prepare((book,))
    book.write_text(book.read_text().replace("To be", "Zu be"))
    os.utime(book, ns=(1, 1))                            # even back in time
    new = prepare((book,))
    assert "Z" in new.tokenizer.chars and new.corpus.sha256 != old.corpus.sha256 and len(calls) == 2 and len(folders(cache)) == 1
    stat = book.stat()
    os.utime(book, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    prepare((book,))
    assert len(calls) == 3 and len(folders(cache)) == 1


@pytest.mark.parametrize("harm", ["short", "long", "no meta", "cut meta", "odd meta", "no tokenizer", "cut tokenizer", "empty folder"])
def test_a_damaged_folder_is_prepared_anew(cache, book, harm):  # noqa: F811
    want = prepare((book,)).train
    folder = cache / "tokens" / folders(cache)[0]
    tokens, meta, tok = (folder / n for n in ("tokens.bin", "meta.json", "tokenizer.json"))
    if harm == "short": tokens.write_bytes(tokens.read_bytes()[:-2])
    elif harm == "long": tokens.write_bytes(tokens.read_bytes() + b"00")
    elif harm == "no meta": meta.unlink()
    elif harm == "cut meta": meta.write_text(meta.read_text()[:-5])
    elif harm == "odd meta": meta.write_text("[]")
    elif harm == "no tokenizer": tok.unlink()
    elif harm == "cut tokenizer": tok.write_text(tok.read_text()[:-5])
    else: [p.unlink() for p in folder.iterdir()]
    assert torch.equal(prepare((book,)).train, want) and folders_that_are_whole(cache) == folders(cache)


@pytest.mark.parametrize("more", ["To be", "new letters: xyz"])
def test_a_file_that_grows_meanwhile_is_refused(cache, book, monkeypatch, more):  # noqa: F811
    real = data_module._encode_into

    def encode_and_append(*a):
        with open(book, "a") as f: f.write(more)
        return real(*a)
    monkeypatch.setattr(data_module, "_encode_into", encode_and_append)
    with one_sentence(CorpusError, "changed while it was read"): prepare((book,))
    assert folders(cache) == []


def test_interrupted_leaves_nothing_behind(cache, book, monkeypatch):  # noqa: F811
    real = data_module._encode_into

    def half(file, *a):
        real(file, *a)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(data_module, "_encode_into", half)
        prepare((book,))
    assert folders(cache) == [] and len(prepare((book,)).train)


STUCK = """
import sys, time, nanogpt_nb.data as d
real = d._encode_into
def stuck(file, *a):
    n = real(file, *a); file.flush()
    print("half way", flush=True)
    time.sleep(600)
d._encode_into = stuck
d.prepare((sys.argv[1],))
"""
PREPARE = """
import sys, nanogpt_nb.data as d
real = d._prepare_folder
d._prepare_folder = lambda *a: (print("prepared", flush=True), real(*a))
print(len(d.prepare((sys.argv[1],)).train))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_leaves_nothing_that_is_taken_for_whole(cache, book):  # noqa: F811
    p = python(STUCK, book)
    assert p.stdout.readline() == "half way\n"
    p.send_signal(signal.SIGKILL)
    p.communicate()
    left = folders(cache)
    assert [f.endswith(".part") for f in left] == [True] and (cache / "tokens" / left[0] / "tokens.bin").stat().st_size > 0
    d = prepare((book,))
    assert d.tokenizer.decode(torch.cat([d.train, d.val])) == book.read_text() and folders(cache) == [left[0].removesuffix(".part")]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_two_processes_prepare_one_after_the_other(cache, book):  # noqa: F811
    "The second waits for the first; when the first is killed, the second does the work."
    first = python(STUCK, book)
    assert first.stdout.readline() == "half way\n"
    second = python(PREPARE, book)
    assert "waiting" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert finish(second).split() == ["prepared", str(int(0.9 * len(book.read_text())))]


def test_two_processes_at_once_prepare_once(cache, plays):  # noqa: F811
    (cache.parent / "big.txt").write_text(plays.text() * 4)
    out = [finish(p).split() for p in [python(PREPARE, cache.parent / "big.txt") for _ in range(2)]]
    assert sorted(map(len, out)) == [1, 2] and out[0][-1] == out[1][-1] and folders_that_are_whole(cache) == folders(cache)


# ---- memory

MEMORY = """
import sys
from nanogpt_nb.data import get_batch, prepare
def status(field): return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024
d = prepare((sys.argv[1],), tokenizer=sys.argv[2], bpe_vocab_size=300)
peak, before = status("VmHWM"), status("VmRSS")
for _ in range(20): get_batch(d.train, 64, 256)
print(peak, status("VmRSS") - before, type(d.train).__name__, d.train.nbytes)
"""


def memory(cache, plays, size, kind="char"):  # noqa: F811
    "Peak memory of a process that prepares a text of `size` bytes, what 20 batches add, and the size of the train split in bytes."
    path = cache.parent / f"{size}.txt"
    with open(path, "w") as f:
        for _ in range(size // len(plays.text())): f.write(plays.text())
    peak, batches, mapped, n = finish(python(MEMORY, path, kind), timeout=1800).split()
    path.unlink()
    assert mapped == "memmap"
    return int(peak), int(batches), int(n)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory from /proc")


@linux
def test_memory_does_not_grow_with_the_text(cache, plays):  # noqa: F811
    (a, more_a, n_a), (b, more_b, n_b) = (memory(cache, plays, size) for size in (20_000_000, 60_000_000))
    assert n_b - n_a > 60_000_000
    assert b - a < 10_000_000, "a text 40 MB longer must not need a quarter of that in memory"
    assert max(more_a, more_b) < 20_000_000, "pages that batches have read are given back"


@linux
@pytest.mark.slow
def test_two_gigabytes_in_less_than_half_a_gigabyte(cache, plays):  # noqa: F811
    peak, more, n = memory(cache, plays, 2_000_000_000)
    assert n > 3_500_000_000 and peak < 500_000_000 and more < 20_000_000


@linux
@pytest.mark.slow
def test_memory_of_byte_pairs(cache, plays):  # noqa: F811
    (a, *_), (b, *_) = (memory(cache, plays, size, "bpe") for size in (20_000_000, 60_000_000))
    assert b - a < 20_000_000


# ---- batches

def lecture_batch(data, batch_size, block_size, generator):
    ix = torch.randint(len(data) - block_size, (batch_size,), generator=generator)
    return torch.stack([data[i:i + block_size] for i in ix]), torch.stack([data[i + 1:i + block_size + 1] for i in ix])


ROWS = {"int64 tensor": lambda t: t, "uint8 tensor": lambda t: t.to(torch.uint8), "uint16 array": lambda t: t.numpy().astype(np.uint16), "uint32 array": lambda t: t.numpy().astype(np.uint32)}


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), batch_size=st.integers(1, 9), block_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_get_batch_is_the_lectures(make, n, batch_size, block_size, seed):
    tokens = torch.randint(200, (n,), generator=seeded(seed))
    if n <= block_size:
        with one_sentence(CorpusError, n, f"block_size={block_size}"): get_batch(make(tokens), batch_size, block_size)
        return
    x, y = get_batch(make(tokens), batch_size, block_size, generator=seeded(seed))
    lx, ly = lecture_batch(tokens, batch_size, block_size, seeded(seed))
    assert torch.equal(x, lx) and torch.equal(y, ly)
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()


def test_get_batch_reaches_both_ends():
    tokens = torch.arange(10)
    x, y = get_batch(tokens, 500, 4, generator=seeded())
    assert set(x[:, 0].tolist()) == set(range(6)) and y.max() == 9


def test_get_batch_and_the_random_state(book):
    tokens = torch.arange(1000)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = get_batch(tokens, 4, 8, generator=seeded())[0]
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(a, get_batch(tokens, 4, 8, generator=seeded())[0])
    b = get_batch(tokens, 4, 8)[0]
    torch.manual_seed(5)
    assert torch.equal(b, get_batch(tokens, 4, 8)[0]) and not torch.equal(torch.get_rng_state(), before)


def test_get_batch_does_not_write(cache, book, on_disk):  # noqa: F811
    d = prepare((book,))
    x, _ = get_batch(d.train, 4, 8)
    x += 1
    assert torch.equal(torch.cat([t.flatten() for t, _ in windows(d.train, 8, 4)]), torch.from_numpy(prepare((book,)).train[:-1].astype(np.int64)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
def test_on_a_gpu(make):
    tokens = torch.randint(200, (1000,), generator=seeded())
    rows = make(tokens)
    want = get_batch(tokens, 4, 8, generator=seeded())
    got = get_batch(rows.cuda() if torch.is_tensor(rows) else rows, 4, 8, device="cuda", generator=seeded())
    assert all(g.device.type == "cuda" and torch.equal(g.cpu(), w) for g, w in zip(got, want))
    assert torch.cat([y.flatten() for _, y in windows(rows, 7, 3, device="cuda")]).tolist() == tokens[1:].tolist()


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 80), block_size=st.integers(1, 20), batch_size=st.integers(1, 7))
def test_windows_predict_every_token_once(make, n, block_size, batch_size):
    tokens = torch.randint(200, (n,), generator=seeded(n))
    got = list(windows(make(tokens), block_size, batch_size))
    assert torch.cat([x.flatten() for x, _ in got]).tolist() == tokens[:-1].tolist()
    assert torch.cat([y.flatten() for _, y in got]).tolist() == tokens[1:].tolist()
    for x, y in got:
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int64 and x.shape[0] <= batch_size and x.shape[1] <= block_size
    assert all(x.shape[1] == block_size for x, _ in got[:-1])


def test_windows_of_nothing():
    for n in (0, 1):
        with one_sentence(CorpusError, n): list(windows(torch.zeros(n, dtype=torch.long), 4, 4))


def test_meta_says_what_was_prepared(cache, book):  # noqa: F811
    d = prepare((book,))
    meta = json.loads((cache / "tokens" / folders(cache)[0] / "meta.json").read_text())
    assert meta["tokens"] == len(book.read_text()) and meta["sha256"] == d.corpus.sha256 and meta["dtype"] == "uint16"
