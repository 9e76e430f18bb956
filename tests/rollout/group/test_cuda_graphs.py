import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from grpo_trl.model_utils import attending_by
from grpo_trl.rollout.base import RolloutRequest, SamplingOptions
from grpo_trl.rollout.group import cuda_graphs as steps
from grpo_trl.rollout.group import engine as group
from grpo_trl.rollout.group.cache import NAME, GroupCache
from grpo_trl.rollout.group.cuda_graphs import EagerSteps, RecordedSteps, _rounded
from grpo_trl.rollout.group.engine import GroupEngine
from grpo_trl.rollout.group.scheduler import Scheduler
from grpo_trl.rollout.sampling import Sampler
from tests.helpers.families import WINDOWED, make_family

from .test_engine import warnings


ENDS = (1, 7, 12, 20, 33, 41)


def record_by_tracing(call):
    """As a CUDA graph: shapes, Python's values and memory are fixed at the first call, that of the result too."""
    call()  # as before a capture: what the first call leaves behind must not be all that is recorded
    traced = make_fx(call, tracing_mode="real")()
    output = traced()

    def launch():
        output.copy_(traced())
        return output

    return launch


class Counted:
    """Recorded steps of an engine, with what they did."""

    def __init__(self, record=record_by_tracing):
        self.record, self.recorded, self.launched, self.steps = record, 0, 0, []

    def make(self, model, cache):
        def record(call):
            self.recorded += 1
            launch = self.record(call)

            def counted():
                self.launched += 1
                return launch()

            return counted

        self.steps.append(RecordedSteps(EagerSteps(model, cache), record))
        return self.steps[-1]


def make_options(**changes) -> SamplingOptions:
    return SamplingOptions(**({"max_completion_length": 24, "pad_token_id": 0, "eos_token_ids": ENDS} | changes))


def make_request(num_generations: int = 5) -> RolloutRequest:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 48, (length,), generator=generator).tolist() for length in (5, 1, 13, 3, 8, 18)]
    return RolloutRequest(["unread"] * 6, prompts, num_generations, list(range(6)))


def write(model, monkeypatch, counted=None, rows=7, **changes):
    """The rollout of an engine whose steps are recorded if there is something to count them with."""
    with monkeypatch.context() as patch:
        if counted is not None:
            patch.setattr(group, "EagerSteps", counted.make)
        engine = GroupEngine(model, make_options(**changes), max_rows_in_flight=rows)
        rollout = engine.rollout(make_request())
    assert engine._reason is None
    return rollout


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "family, changes, columns",
    [
        ("qwen2", {"num_hidden_layers": 1}, 16),
        ("gemma2", WINDOWED["gemma2"], 256),
        slow("qwen2", {}, 256),
        slow("qwen2", WINDOWED["qwen2"], 16),
        slow("gemma2", WINDOWED["gemma2"], 16),
        slow("gpt_neox", {}, 16),
        slow("olmo2", {}, 256),
    ],
)
def test_a_rollout_of_recorded_steps_is_the_eager_one(monkeypatch, family, changes, columns):
    monkeypatch.setattr(steps, "LEAST_COLUMNS", columns)
    model = make_family(family, **changes).double()
    expected = write(model, monkeypatch)
    counted = Counted()
    recorded = write(model, monkeypatch, counted)
    assert [c.ids for c in recorded.completions] == [c.ids for c in expected.completions]
    assert [c.ended for c in recorded.completions] == [c.ended for c in expected.completions]
    for mine, other in zip(recorded.completions, expected.completions, strict=True):
        assert mine.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-9)
    assert len({len(c.ids) for c in expected.completions}) > 5
    assert counted.recorded == sum(len(each._recorded) for each in counted.steps)
    assert counted.launched > 2 * counted.recorded > 0
    assert not any(each.refused for each in counted.steps)


@pytest.mark.parametrize("rows", [3, slow(1), slow(16), slow(30)])
def test_a_rollout_of_recorded_steps_is_the_eager_one_for_any_rows(monkeypatch, rows):
    model = make_family("qwen2", num_hidden_layers=1).double()
    expected = write(model, monkeypatch, rows=rows)
    counted = Counted()
    recorded = write(model, monkeypatch, counted, rows=rows, max_completion_length=24)
    assert [c.ids for c in recorded.completions] == [c.ids for c in expected.completions]
    assert counted.launched > counted.recorded > 0


@pytest.mark.slow
def test_rows_that_only_fill_up_a_step_count_as_computed(monkeypatch):
    model = make_family("qwen2", num_hidden_layers=1).double()
    expected = write(model, monkeypatch, rows=30)
    recorded = write(model, monkeypatch, Counted(), rows=30)
    tokens = sum(len(c.ids) for c in expected.completions)
    assert expected.computed_tokens == tokens < recorded.computed_tokens < 3 * tokens


# ---- One step ----
class Spy:
    """Keeps a decoding's steps, and the logits and the cache's memory after each."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def __call__(self, step):
        logits, computed = self.inner(step)
        cache = (self.inner.eager if isinstance(self.inner, RecordedSteps) else self.inner).cache
        memory = [(x.own.clone(),) for x in cache._layers.values()]
        self.seen.append((step, logits.clone(), computed, memory))
        return logits, computed


def decode(model, make, rows=12, request=None):
    options = make_options()
    request = request or make_request()
    cache = GroupCache(rows, 6, 32, 32)
    spy = Spy(make(model, cache))
    told = lambda tokens, ended: None  # noqa: E731
    with torch.no_grad(), attending_by(model, NAME):
        Scheduler(model, Sampler(model, options), options, None, request, cache, spy, told).run()
    return spy.seen


def test_rows_that_fill_up_a_step_disturb_no_row(monkeypatch):
    model = make_family("qwen2", num_hidden_layers=1).double().eval()
    eager, recorded = decode(model, EagerSteps), decode(model, Counted().make)
    assert len(eager) == len(recorded)
    padded = 0
    for (step, logits, computed, memory), (_, mine, mine_computed, my_memory) in zip(eager, recorded, strict=True):
        rows = len(step.tokens_R)
        assert computed == rows == len(logits) == len(mine)
        assert rows <= mine_computed == min(_rounded(rows), 12)
        padded += mine_computed > rows
        assert (logits - mine).abs().max() < 1e-9
        for layer, my_layer in zip(memory, my_memory, strict=True):
            for part, my_part in zip(layer, my_layer, strict=True):
                for row, length in enumerate(step.lengths_R.tolist()):
                    assert (part[row, : length + 1] - my_part[row, : length + 1]).abs().max() < 1e-9
    assert padded > 3


def test_a_step_is_recorded_once_for_each_shape(monkeypatch):
    monkeypatch.setattr(steps, "LEAST_COLUMNS", 8)
    model = make_family("qwen2", num_hidden_layers=1).double().eval()
    counted = Counted()
    seen = decode(model, counted.make)
    expected, largest = set(), 1
    for place, (step, _, computed, _) in enumerate(seen):
        assert computed == min(_rounded(len(step.tokens_R)), 12)
        columns = 8 if int(step.lengths_R.max()) < 8 else 16
        prompts, most = step.rows_NG.shape
        largest = max(largest, _rounded(most))
        if place:  # the first step is called, which tells how large its logits are
            expected.add((computed, columns, min(_rounded(prompts), 6), largest))
    assert counted.recorded == len(expected)
    assert counted.launched == len(seen) - 1
    assert {columns for _, columns, *_ in expected} == {8, 16}


def test_the_memory_that_a_recording_reads_is_not_that_of_the_next_step():
    """The recorded tensors stay where they are, and a step that is repeated gives the same again."""
    model = make_family("qwen2", num_hidden_layers=1).double().eval()
    seen = [step for step, *_ in decode(model, EagerSteps)]
    shapes = [(len(step.tokens_R), step.rows_NG.shape) for step in seen]
    first = next(i for i in range(len(seen) - 1) if shapes[i] == shapes[i + 1])
    cache = GroupCache(12, 6, 32, 32)
    recorded = Counted().make(model, cache)
    options = make_options()
    captured = {}

    class EnoughError(Exception):
        pass

    def stop_before(step):
        if len(captured) == first:
            raise EnoughError
        captured[len(captured)] = step
        return EagerSteps(model, cache)(step)

    told = lambda tokens, ended: None  # noqa: E731
    with torch.no_grad(), attending_by(model, NAME):
        with pytest.raises(EnoughError):
            Scheduler(model, Sampler(model, options), options, None, make_request(), cache, stop_before, told).run()
        one = recorded(seen[first])[0].clone()
        kept = replace(seen[first], tokens_R=seen[first].tokens_R.clone())
        other = recorded(replace(seen[first], tokens_R=(seen[first].tokens_R + 5) % 48))[0].clone()
        again = recorded(kept)[0].clone()
    assert len(recorded._recorded) == 1
    assert (one - again).abs().max() < 1e-12
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("fails_at", [1, 3])
def test_steps_go_on_without_recording_where_it_fails(monkeypatch, caplog, fails_at):
    model = make_family("qwen2", num_hidden_layers=1).double()
    expected = write(model, monkeypatch)
    caplog.clear()
    tried = []

    def fail(call):
        tried.append(call)
        if len(tried) >= fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record_by_tracing(call)

    counted = Counted(fail)
    with monkeypatch.context() as patch:
        engine = GroupEngine(model, make_options(), max_rows_in_flight=7)
        engine.rollout(make_request())  # the comparison at the first rollout has steps of its own
        patch.setattr(group, "EagerSteps", counted.make)
        rollout = engine.rollout(make_request())
    assert [c.ids for c in rollout.completions] == [c.ids for c in expected.completions]
    assert len(tried) == fails_at
    (line,) = warnings(caplog)
    assert "cannot be recorded" in line
    assert "operation not permitted when stream is capturing" in line


def test_counts_are_rounded_up_to_few_values():
    for count in range(1, 300):
        rounded = _rounded(count)
        assert count <= rounded == _rounded(rounded) < max(2 * count, count + 64)
        assert rounded in (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320)


# ---- The recorder ----
class FakeCuda:
    """The calls of torch.cuda that a recorder makes, in their order."""

    def __init__(self, monkeypatch):
        self.events, self.mode = [], "default"
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(cuda, "Stream", lambda: self.events.append("new stream") or Stream("side"))
        monkeypatch.setattr(cuda, "current_stream", lambda: Stream("own"))
        monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "set_stream", lambda stream: None)
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.events.append("replay")))
        monkeypatch.setattr(cuda, "graph", self.graph)
        monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.events.append(f"capture on {stream.name}")
        yield


class Stream(SimpleNamespace):
    def __init__(self, name):
        super().__init__(name=name)

    def wait_stream(self, other):
        pass


def test_recordings_share_a_stream_and_are_rehearsed(monkeypatch):
    fake = FakeCuda(monkeypatch)
    record = steps.CudaRecorder()
    for _ in range(3):
        launch = record(lambda: fake.events.append(f"call in mode {fake.mode}"))
        launch()
    assert fake.events.count("new stream") == 1
    assert fake.events[1:5] == ["call in mode error", "capture on side", "call in mode default", "replay"]


def test_a_call_that_waits_for_the_device_is_refused_before_anything_is_recorded(monkeypatch):
    fake = FakeCuda(monkeypatch)

    def call():
        if fake.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        steps.CudaRecorder()(call)
    assert not [event for event in fake.events if event.startswith("capture")]
    assert fake.mode == "default"


def test_memory_that_runs_out_in_recording_is_not_taken_for_a_refusal(monkeypatch):
    def fail(call):
        raise RuntimeError("CUDA error: out of memory")

    model = make_family("qwen2", num_hidden_layers=1).double().eval()
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(model, lambda model, cache: RecordedSteps(EagerSteps(model, cache), fail))
