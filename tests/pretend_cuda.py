"Enough of torch.cuda for the code that records, on a machine without: what is recorded is played by doing it again."

import contextlib

import torch


class Stream:
    waited: list = []

    def wait_stream(self, other):
        self.waited.append(other)


class Graph:
    "What was done inside `torch.cuda.graph` is given by `does`, a function."

    made: list = []
    does = None
    generators: list

    def __init__(self):
        self.generators, self.played = [], 0
        self.made.append(self)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.played += 1
        type(self).does()


def pretend_cuda(monkeypatch, does, around=contextlib.nullcontext, fails=None):
    "Patch torch.cuda; what is done while recording happens inside `around()`, and ends with the error `fails`."
    here = Stream()
    Graph.made, Graph.does = [], staticmethod(does)
    set_to = []

    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        assert isinstance(graph, Graph) and isinstance(stream, Stream) and capture_error_mode == "thread_local"
        with around():
            yield
        if fails:
            raise fails

    fakes = dict(
        Stream=Stream, CUDAGraph=Graph, graph=graph, stream=lambda s: contextlib.nullcontext(), device=lambda d: contextlib.nullcontext(),
        current_stream=lambda: here, set_stream=set_to.append, synchronize=lambda: None, current_device=lambda: 0, default_generators=(torch.Generator(),),
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return here, set_to
