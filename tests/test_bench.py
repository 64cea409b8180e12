"How fast it is: what `nanogpt bench` counts, measures, shows and refuses."

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanogpt_nb import bench as module
from nanogpt_nb.bench import EXTRA, bench, subject
from nanogpt_nb.bench_table import LINES, Bench
from nanogpt_nb.ceiling import Timed, begin_peak, ceiling, flops_per_token, peak, product
from nanogpt_nb.cli import main
from nanogpt_nb.config import PRESETS, ConfigError, NanoGPTConfig, NanoGPTError
from nanogpt_nb.gpt import GPT

CPU = torch.device("cpu")
SMALL = NanoGPTConfig.preset("tiny").replace(n_layer=1, batch_size=4, device="cpu")


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    "One thread, and a ceiling of small matrices."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "product", lambda d, dtype, config: product(d, dtype, config, size=384))
    yield
    torch.set_num_threads(before)


# What is counted


@pytest.mark.parametrize(
    "changes", [{}, {"tie_weights": True}, {"mlp": "swiglu", "position": "rope"}, {"ngrams": 3}, {"qkv_bias": True, "n_layer": 3}], ids=str
)
def test_the_formula_is_what_torch_counts(changes):
    "To the operation, where attention is in separate products; inside of the CPU's fused kernel torch counts nothing, so attention is what is missing then."
    config = NanoGPTConfig.preset("nanogpt-cpu").replace(n_layer=2, n_embd=64, block_size=32, tie_weights=False).replace(**changes)
    model, B, T = GPT(config, 65), 2, config.block_size
    x = torch.randint(65, (B, T))
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = model(x, x)[1]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == B * T * flops_per_token(model, training=False)
    assert forward.get_total_flops() + backward.get_total_flops() == B * T * flops_per_token(model)
    with FlopCounterMode(display=False) as fused, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(x, x)
    missing = B * T * flops_per_token(model, training=False) - fused.get_total_flops()
    assert missing in (0, 4 * B * T * config.n_layer * config.n_embd * T)  # 0: for a torch that counts it


def test_gpt2_has_the_shape_of_gpt2():
    name, config, vocabulary = subject("gpt2", CPU)
    with torch.device("meta"):
        model = GPT(config, vocabulary)
    assert round(model.num_parameters() / 1e6) == 124 and config.block_size == 1024
    assert subject("gpt2", torch.device("cuda"))[1].batch_size > config.batch_size


# What is measured


def test_the_ceiling_is_above_what_a_model_reaches():
    told = bench("tiny", SMALL, device="cpu", seconds=0.1, progress=False)
    most = ceiling("cpu", torch.float32, seconds=0.1, size=384)
    assert most > 0
    for row in told:
        assert 0 < row["flops_per_second"] < max(most, row["ceiling"])
        assert row["utilisation"] == row["flops_per_second"] / row["ceiling"]
        assert row["flops_per_second"] == row["training"] * row["flops_per_token"]
        assert math.isclose(row["training"] * row["seconds_per_step"], row["batch_size"] * row["block_size"])


def test_warming_up_finds_how_many_calls_fill_a_stretch(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("nanogpt_nb.ceiling.time.perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 5.0 if len(calls) == 1 else 0.25  # the first is slow

    job = Timed("", call, 100, SMALL, CPU)
    job.warm_up(2.0)
    assert job.n == 8 and job.rates == []
    job.stretch()
    assert job.rates == [400.0] and job.spent == 2.0
    job.stretch(4)
    assert job.rates == [400.0] * 5 and len(calls) >= 17


def test_everything_takes_its_turn():
    order = []
    jobs = [(name, Timed(name, lambda name=name: order.append(name), 1, SMALL, CPU)) for name in "abc"]
    with module._bar(False) as bar:
        assert not module._take_turns(jobs, 1e9, bar)
    assert order == list("abc") * module.TURNS


def test_what_takes_longer_than_its_time_is_measured_once():
    order = []
    jobs = [("slow", Timed("slow", lambda: order.append(1), 1, SMALL, CPU))]
    with module._bar(False) as bar:
        module._take_turns(jobs, 0.0, bar)
    assert len(order) == 1


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_ctrl_c_leaves_what_is_known_after_the_first_round(calls):
    "Two things to time; Ctrl-C comes in the call of that number."
    done = []

    def call():
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt

    jobs = [(name, Timed(name, call, 1, SMALL, CPU)) for name in "ab"]
    with module._bar(False) as bar:
        if calls <= len(jobs):
            with pytest.raises(KeyboardInterrupt):
                module._take_turns(jobs, 1e9, bar)
        else:
            assert module._take_turns(jobs, 1e9, bar)
            assert [len(job.rates) for _, job in jobs] == [2, 2]


def test_contexts_without_cache_are_as_long_as_those_with_it():
    model = GPT(SMALL, 65).eval()
    seen, forward = {"cache": [], "no cache": []}, model.forward
    cached, afresh = module._sampling(model, CPU, 2)
    for kind, job in (("cache", cached), ("no cache", afresh)):
        model.forward = lambda idx, *args, kind=kind, cache=None, **kw: (
            seen[kind].append((idx.size(1), cache[0].length if cache else 0)) or forward(idx, *args, cache=cache, **kw)
        )
        for _ in range(90):
            job.call()
    lengths = [n for n, _ in seen["no cache"]]
    held = [new + before for new, before in seen["cache"]]
    half = SMALL.block_size // 2
    assert set(lengths) == set(held) == set(range(half, SMALL.block_size + 1))
    assert abs(sum(lengths) / len(lengths) - sum(held) / len(held)) < 0.5
    assert [new for new, before in seen["cache"] if before == 0] == [half] * 10


def test_memory_is_watched():
    before = begin_peak(CPU)
    held = torch.ones(8 << 20)
    assert before == 0 and peak(CPU) > held.nbytes


def test_random_numbers_and_threads_are_as_before():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    bench(SMALL, device="cpu", seconds=0.01, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_step_is_captured_and_below_the_ceiling():
    (row,) = bench("modern", device="cuda", seconds=0.5, progress=False)
    assert row["captured"] and 0 < row["utilisation"] < 1 and row["threads"] is None and row["memory"] > 0


# What is shown


@pytest.fixture(scope="module")
def told():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = bench(SMALL, "tiny", SMALL.replace(n_embd=16), device="cpu", seconds=0.05, batch=3, batch_size=2, progress=False)
    torch.set_num_threads(before)
    return made


def test_the_table_has_each_preset_and_each_figure(told):
    assert [row["preset"] for row in told] == ["custom", "tiny", "custom 2"]
    assert all(row["batch_size"] == 2 for row in told)
    for shown in (told.text(), repr(told), told._repr_html_()):
        for said in ("tiny", "custom 2", "MFU of training", "ceiling", "writing 3 texts, tokens/s, no cache", "MiB", told.machine["torch"]):
            assert said in shown
    assert len({len(line) for line in told.lines()}) == 1
    assert {head for head, *_ in told.lines()} >= {head for key, (head, _) in LINES.items() if key != "captured"}


def test_a_narrow_terminal_has_all_of_it(told):
    tables = told.text(50).split("\n\n")[:-1]
    assert len(tables) > 1 and max(len(line) for table in tables for line in table.splitlines()) <= 50
    assert all(any(row["preset"] in table.splitlines()[0] for table in tables) for row in told)


def test_json_holds_all_of_it(told):
    again = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert again["presets"] == told.rows and not again["stopped"]
    assert {"training", "forward", "utilisation", "ceiling", "memory", "sampling_1", "sampling_1_no_cache", "sampling_3"} <= set(
        again["presets"][0]
    )


def test_a_slice_is_a_table(told):
    assert isinstance(told[1:], Bench) and [row["preset"] for row in told[1:]] == ["tiny", "custom 2"]


def test_names_are_text_to_a_browser(told):
    assert "<b>" not in Bench([told[0] | {"preset": "<b>"}], told.machine, ["<b>"])._repr_html_()


def test_the_picture_says_what_it_shows(told):
    pytest.importorskip("matplotlib")
    picture = told.plot()
    assert all(f"{row['preset']} trains {row['training']:,.0f} tokens/s" in picture.text for row in told)
    assert [label.get_text() for label in picture.figure.axes[0].get_yticklabels()] == ["custom 2", "tiny", "custom"]


# The command


def test_the_command_prints_json_and_keeps_it(tmp_path, capsys):
    assert main(["bench", "tiny", "--device", "cpu", "--seconds", "0.02", "--json", "--out", str(tmp_path / "bench.json")]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == json.loads((tmp_path / "bench.json").read_text())
    assert [row["preset"] for row in json.loads(out)["presets"]] == ["tiny"]


def test_what_was_stopped_is_printed_and_ends_with_130(monkeypatch, capsys, told):
    monkeypatch.setattr(module, "bench", lambda *_, **__: Bench(told.rows, told.machine, stopped=True))
    assert main(["bench"]) == 130
    assert "Stopped before all turns" in capsys.readouterr().out


def test_all_means_every_preset(monkeypatch, told):
    asked = []
    monkeypatch.setattr(module, "bench", lambda *presets, **__: asked.append(presets) or told)
    assert main(["bench", "--all"]) == 0
    assert asked == [tuple(PRESETS)]


def test_without_a_name_it_is_the_preset_for_the_device(monkeypatch, told):
    asked = []
    monkeypatch.setattr(module, "_measure", lambda subjects, *_: asked.extend(subjects) or told)
    bench(device="cpu", progress=False)
    assert [name for name, *_ in asked] == ["cpu"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nanogtp-cpu"], "'nanogtp-cpu' is not a preset, did you mean nanogpt-cpu;"),
        (["zzz"], f"'zzz' is not a preset; choose from {', '.join([*PRESETS, *EXTRA])}."),
        (["--device", "gpu"], "device='gpu' is not known"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--seconds", "0"], "seconds=0.0 is out of bounds"),
        (["--batch", "0"], "batch=0 is out of bounds"),
        (["--batch-size", "-1"], "batch_size=-1 is out of bounds"),
        (["tiny", "--all"], "leave tiny out"),
        (["tiny", "--out", "no/folder/x.json"], "--out no/folder/x.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence_and_ends_with_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=repr,
)
def test_a_full_memory_names_the_cure(error, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(module, "_prepared", full)
    with pytest.raises(NanoGPTError, match="--batch-size 2"):
        bench(SMALL, device="cpu", progress=False)


def test_what_is_no_preset_is_refused():
    with pytest.raises(ConfigError, match="3"):
        bench(3, device="cpu")
