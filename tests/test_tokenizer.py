"Characters and byte pairs: there and back, streamed, saved, and all that can be wrong with them."

import json

import numpy as np
import pytest
import torch
from data_fixtures import finish, one_sentence, plays, python  # noqa: F401
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt_nb.corpus import SHAKESPEARE_CHARS
from nanogpt_nb.tokenizer import BPETokenizer, CharTokenizer, TokenizerError, _cut_at_blanks, id_dtype, load_tokenizer

TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=200)
WORDS = st.lists(st.sampled_from(["the", " ", "  ", "\n", "\t", "don't", "12", "é", "漢字", "🎭", "\u00a0", "\u2003", "\x1c", "!", "\x85", " 's"]), max_size=60).map("".join)


@pytest.fixture(scope="module")
def bpe(plays):  # noqa: F811
    return BPETokenizer.train([plays.text()[:200_000]], vocab_size=400)


# ---- there and back

@settings(deadline=None)
@given(TEXT.filter(bool))
def test_char_there_and_back(text):
    tok = CharTokenizer.train([text])
    assert tok.chars == "".join(sorted(set(text))) and tok.vocab_size == len(set(text))
    ids = tok.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == [tok.chars.index(c) for c in text]
    assert tok.decode(ids) == text


@settings(deadline=None)
@given(TEXT | WORDS)
@example("\x00 \ufeff\r\n")
def test_bpe_there_and_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and (not len(ids) or ids.max() < bpe.vocab_size)


def test_shakespeare(plays):  # noqa: F811
    "The lecture's: the same 65 ids, and its example."
    tok = CharTokenizer(SHAKESPEARE_CHARS)
    assert tok.vocab_size == 65
    assert tok.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]
    text = plays.text()
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("ids", [[1, 0], (1, 0), np.array([1, 0]), np.array([1, 0], np.uint16), torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.int16)])
def test_decode_takes_any_row_of_ids(ids, bpe):
    assert CharTokenizer("ab").decode(ids) == "ba"
    assert bpe.decode(ids) == '"!'


def test_decode_one_and_none():
    tok = CharTokenizer("ab")
    assert tok.decode(1) == tok.decode(torch.tensor(1)) == "b" and tok.decode([]) == tok.decode(torch.tensor([])) == ""
    assert tok.encode("").tolist() == []


def test_bpe_packs_more_and_grows_with_the_vocabulary(plays):  # noqa: F811
    text = plays.text()[:100_000]
    sizes = [len(BPETokenizer.train([text], vocab_size=v).encode(text)) for v in (256, 300, 600)]
    assert sizes[0] == len(text) > sizes[1] > sizes[2]


def test_bpe_training_is_the_same_every_time(plays):  # noqa: F811
    text = plays.text()[:100_000]
    code = "import sys; from nanogpt_nb.tokenizer import BPETokenizer; print(BPETokenizer.train([sys.stdin.read()], 400).to_json())"
    process = python(code, stdin=-1)
    out, _ = process.communicate(text)
    assert json.loads(out) == json.loads(BPETokenizer.train([text], 400).to_json())


def test_bpe_of_a_text_with_few_pairs():
    assert BPETokenizer.train(["ab"], vocab_size=1000).vocab_size == 257


# ---- streamed

@settings(deadline=None)
@given(WORDS, st.data())
def test_streamed_is_whole(bpe, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    pieces = list(_cut_at_blanks(chunks, size=4))
    assert "".join(pieces) == text and all(len(p) <= 8 for p in pieces)
    assert pieces == list(_cut_at_blanks([text], size=4))
    assert sum((t.tolist() for t in bpe.encode_chunks(chunks)), []) == bpe.encode(text).tolist() == bpe.inner.encode(text).ids
    if text:
        char = CharTokenizer.train(chunks)
        assert sum((t.tolist() for t in char.encode_chunks(chunks)), []) == char.encode(text).tolist()


@settings(deadline=None)
@given(WORDS)
def test_cutting_at_blanks_changes_no_pair(bpe, text):
    "Wherever a piece ends at a blank, byte pairs are the same as in the whole text."
    pieces, i = list(_cut_at_blanks([text], size=4)), 0
    for p in pieces[:-1]:
        i += len(p)
        if text[i] in " \n" and not text[i - 1].isspace():
            assert bpe.inner.encode(text[:i]).ids + bpe.inner.encode(text[i:]).ids == bpe.inner.encode(text).ids


def test_a_long_text_is_encoded_as_the_library_does(plays, bpe):  # noqa: F811
    text = plays.text()[:300_000]
    assert bpe.encode(text).tolist() == bpe.inner.encode(text).ids


def test_a_text_without_blanks(bpe):
    text = "漢字" * 20_000
    assert bpe.decode(bpe.encode(text)) == text
    chunks = [text[i:i + 777] for i in range(0, len(text), 777)]
    assert np.array_equal(np.concatenate(list(bpe.encode_chunks(chunks))), bpe.encode(text))


# ---- what can be wrong

def test_unknown_character():
    tok = CharTokenizer.train(["to be\n"])
    with one_sentence(TokenizerError, "'é'", "U+00E9", "line 2, column 4"): tok.encode("to\nbe é")
    with one_sentence(TokenizerError, "'🎭'", "U+1F3AD", "line 1, column 1", "6 characters"): tok.encode("🎭")
    with one_sentence(TokenizerError, "'a'", "U+0061"): tok.encode("a")


@pytest.mark.parametrize("ids, said", [([0, 2], "2 at place 1"), ([-1], "-1 at place 0"), ([10**12], "1000000000000"), (torch.tensor([0, 1, 5]), "5 at place 2")])
def test_id_out_of_range(ids, said):
    with one_sentence(TokenizerError, said, "0 to 1"): CharTokenizer("ab").decode(ids)


@pytest.mark.parametrize("wrong", [400, -1])
def test_byte_pair_out_of_range(wrong, bpe):
    with one_sentence(TokenizerError, f"{wrong} at place 1", "0 to 399"): bpe.decode([7, wrong])


@pytest.mark.parametrize("ids", [[0.5], [[0, 1]], ["a"], torch.zeros(2, 2, dtype=torch.long), [None]])
def test_not_a_row_of_ids(ids):
    with one_sentence(TokenizerError, "whole numbers"): CharTokenizer("ab").decode(ids)


def test_no_vocabulary():
    for make in (lambda: CharTokenizer(""), lambda: CharTokenizer.train([]), lambda: CharTokenizer("aba")):
        with one_sentence(TokenizerError, "vocabulary"): make()
    with one_sentence(TokenizerError, "255", "256"): BPETokenizer.train(["text"], vocab_size=255)


def test_half_a_character(bpe):
    with one_sentence(TokenizerError, "surrogate"): bpe.encode("a\ud800")
    assert CharTokenizer("a\ud800").decode([1]) == "\ud800"


# ---- as a file

@pytest.mark.parametrize("make", [lambda: CharTokenizer(SHAKESPEARE_CHARS), lambda: CharTokenizer("\x00é\u2028🎭\ud800\"\\"), lambda: BPETokenizer.train(["to be or not to be"], 260)])
def test_saved_and_loaded(make, tmp_path):
    tok, path = make(), tmp_path / "tokenizer.json"
    tok.save(path)
    again = load_tokenizer(path)
    assert again == tok and type(again) is type(tok) and again.vocab_size == tok.vocab_size and again.dtype == tok.dtype
    text = tok.chars if tok.kind == "char" else "to be 🎭"
    assert again.encode(text).tolist() == tok.encode(text).tolist() and again.decode(again.encode(text)) == text
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_equal_only_if_they_encode_alike(bpe):
    assert CharTokenizer("ab") == CharTokenizer("ab") != CharTokenizer("ba") and CharTokenizer("ab") != bpe and bpe != "bpe"


def test_every_cut_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train(["to be"], 258).save(path)
    whole = path.read_bytes()
    for n in [0, 1, 10, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:n])
        with one_sentence(TokenizerError, path): load_tokenizer(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"kind": "words"}', '{"kind": "char"}', '{"kind": "char", "chars": [1]}', '{"kind": "char", "chars": ""}',
                                  '{"kind": "char", "chars": "aa"}', '{"kind": "bpe"}', '{"kind": "bpe", "tokenizer": {}}', '{"kind": "bpe", "tokenizer": 3}', "\ufeff", "\xff"])
def test_not_a_tokenizer(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="latin-1" if text == "\xff" else "utf-8")
    with one_sentence(TokenizerError, path): load_tokenizer(path)


def test_no_such_file(tmp_path):
    with one_sentence(TokenizerError, "no.json"): load_tokenizer(tmp_path / "no.json")
    with one_sentence(TokenizerError, tmp_path): load_tokenizer(tmp_path)


def test_id_dtype():
    assert id_dtype(65) == id_dtype(65536) == np.uint16 and id_dtype(65537) == np.uint32
    many = CharTokenizer([chr(i) for i in range(0x10000, 0x10000 + 70_000)])
    last = chr(0x10000 + 69_999)
    assert many.dtype == np.uint32 and many.encode(last).tolist() == [69_999] and many.decode([69_999]) == last


def test_import_is_light():
    code = "import sys, nanogpt_nb.tokenizer; print([m for m in ('torch', 'tokenizers', 'tqdm') if m in sys.modules])"
    assert finish(python(code)).strip() == "[]"
