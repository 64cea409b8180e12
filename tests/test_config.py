"Hyperparameters: what is refused and how it is said, and JSON of any age."

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_nb.config import PRESETS, ConfigError, NanoGPTConfig, write_whole

BAD = {
    "n_embd": [100, 0, -6, 3.5, "384", None, True],
    "num_heads": [0, 5, 2.0],
    "batch_size": [0, -1, "64", 1e3],
    "block_size": [0, -8, 8.0],
    "max_iters": [0, None],
    "eval_interval": [-1],
    "eval_iters": [-1],
    "dropout": [1.5, 1, -0.1, float("nan"), "0.1", False],
    "learning_rate": [0, -1e-3, float("inf"), float("nan")],
    "device": ["gpu", "cuda:", "cuda:x", "cpu:0", "", 0],
    "tokenizer": ["words", 1],
    "bpe_vocab_size": [100],
    "data": [(), (1,), None],
    "norm": ["batchnorm"],
    "position": ["alibi"],
    "mlp": ["tanh"],
    "optimizer": ["sgd"],
    "schedule": ["linear"],
    "dtype": ["float16"],
    "beta1": [1.0, -0.5],
    "weight_decay": [-1],
    "grad_clip": [-1],
    "decay_fraction": [1.5],
    "seed": [-1, 1.5, 2**64],
    "compile": ["yes", 1],
    "cuda_graph": ["no", 0],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD.items() for v in values])
def test_a_value_that_cannot_be_is_named_with_its_field(field, value):
    with pytest.raises(ConfigError) as e:
        NanoGPTConfig(**{field: value})
    said = str(e.value)
    assert field in said and e.value.exit_code == 2
    assert repr(value) in said or field == "num_heads", said
    assert "\n" not in said


def test_rotary_embeddings_need_pairs():
    with pytest.raises(ConfigError, match="heads of 3 numbers"):
        NanoGPTConfig(n_embd=6, num_heads=2, position="rope")


def test_the_defaults_are_the_write_ups():
    d = dataclasses.asdict(NanoGPTConfig())
    assert list(d)[:11] == "batch_size block_size max_iters eval_interval learning_rate device eval_iters n_embd num_heads n_layer dropout".split()
    assert [d[k] for k in list(d)[:5]] == [64, 256, 5000, 500, 3e-4] and [d[k] for k in list(d)[6:11]] == [200, 384, 6, 6, 0.2]


def test_every_field_says_what_it_is():
    "tyro and the reader find a comment at each field."
    import inspect

    lines = inspect.getsource(NanoGPTConfig).splitlines()
    for f in dataclasses.fields(NanoGPTConfig):
        line = next(x for x in lines if x.strip().startswith(f"{f.name}:"))
        assert len(line.partition("# ")[2]) > 8, f.name


@given(
    st.fixed_dictionaries(
        {},
        optional=dict(
            batch_size=st.integers(1, 4096), learning_rate=st.floats(1e-8, 10), dropout=st.floats(0, 0.99), norm=st.sampled_from(["layernorm", "rmsnorm"]),
            data=st.lists(st.text(min_size=1), min_size=1).map(tuple), tie_weights=st.booleans(), seed=st.integers(0, 2**31),
        ),
    )
)  # fmt: skip
def test_json_and_back(changes):
    config = NanoGPTConfig(**changes)
    assert NanoGPTConfig.from_json(config.to_json(), tell=pytest.fail) == config
    assert set(NanoGPTConfig().diff(config)) == {k for k, v in changes.items() if v != getattr(NanoGPTConfig(), k)}


def test_json_of_another_version():
    d = json.loads(NanoGPTConfig(n_layer=3).to_json())
    del d["seed"]
    d["flux_capacitor"] = 1.21
    with pytest.warns(UserWarning) as said:
        assert NanoGPTConfig.from_json(json.dumps(d)) == NanoGPTConfig(n_layer=3)
    assert "flux_capacitor" in str(said[0].message) and "seed" in str(said[1].message)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"n_layer": 0}', '{"n_layer": "six"}'])
def test_json_that_is_no_configuration(text):
    with pytest.raises(ConfigError):
        NanoGPTConfig.from_json(text, tell=lambda said: None)


def test_a_patched_method_leaves_the_function_of_its_name():
    from nanogpt_nb import config

    class Thing:
        pass

    def shout(self: Thing):
        return "method"

    shout.__globals__["shout"] = before = lambda: "function"
    try:
        assert config.patch(shout) is before
        assert Thing().shout() == "method"
    finally:
        del shout.__globals__["shout"]


def test_one_text_may_be_given_by_itself():
    assert NanoGPTConfig(data="input.txt").data == ("input.txt",)


def test_presets_and_replace():
    for name in PRESETS:
        assert NanoGPTConfig.preset(name).replace() == NanoGPTConfig.preset(name)
    with pytest.raises(ConfigError, match="'huge' is not a preset"):
        NanoGPTConfig.preset("huge")
    with pytest.raises(ConfigError, match="'n_heads' is not a hyperparameter"):
        NanoGPTConfig().replace(n_heads=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NanoGPTConfig().n_layer = 3


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "config.json"
    write_whole(target, "old")
    with pytest.raises(TypeError):
        write_whole(target, 3)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]
    words = f"import resource, pathlib; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); from nanogpt_nb.config import write_whole; write_whole({str(target)!r}, 'x' * 100)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]
