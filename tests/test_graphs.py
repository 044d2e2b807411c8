"""The choice of CUDA graphs, with stand-ins for XLA's programs and the clock."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.compute import graphs, parallel
from bsce_jax.config.fields import RUN
from bsce_jax.errors import UserError

GPU = types.SimpleNamespace(platform="gpu", mode="jit", num_processes=1)
MS = {"default": 4.0, "convolutions": 3.0, "whole": 2.0, "concurrent": 1.0}


class Jitted:
    """A jitted function of which each kind of graphs takes its time.

    Attributes:
      compiled: kinds, in the order in which they were compiled.
    """

    def __init__(self, clock, ms=MS, compile_seconds=1.0, broken=(), failing=()):
        self.clock, self.ms, self.compile_seconds = clock, ms, compile_seconds
        self.broken, self.failing = broken, failing
        self.compiled = []

    def lower(self, *arguments):
        return self

    def compile(self, compiler_options=None):
        given = compiler_options or {}
        (kind,) = [kind for kind, own in graphs.OPTIONS.items() if own == given]
        self.compiled.append(kind)
        self.clock[0] += self.compile_seconds
        if kind in self.broken:
            raise jax.errors.JaxRuntimeError("No such compile option:\n'xla_gpu_x'")

        def program(state, by):
            if kind in self.failing:
                raise jax.errors.JaxRuntimeError("out of memory")
            self.clock[0] += self.ms[kind] / 1e3
            found = state + by
            state.delete()  # donated
            return found, kind

        return program


@pytest.fixture
def clock(monkeypatch):
    """Seconds, in a list."""
    now = [100.0]
    monkeypatch.setattr(graphs.time, "monotonic", lambda: now[0])
    return now


def first_call(jitted, kind="auto"):
    """The kind that a run has after one call, and what the call returned."""
    chosen = graphs.Graphs(kind, GPU)
    state, ran = chosen.compiled(jitted)(jnp.ones(2), 1.0)
    np.testing.assert_array_equal(state, 2)  # timing has not moved it
    return chosen, ran


@pytest.mark.parametrize("kind", ["convolutions", "whole", "concurrent"])
def test_the_options_of_a_kind_reach_the_compiler(clock, kind):
    jitted = Jitted(clock)
    chosen, ran = first_call(jitted, kind)
    assert ran == kind and jitted.compiled == [kind]
    step = chosen.compiled(jitted)
    step(step(jnp.ones(2), 1.0)[0], 1.0)
    assert jitted.compiled == [kind]  # once for each function
    assert chosen.compiled(Jitted(clock)) is not step
    step.compile((jnp.ones(2), 1.0))  # for shapes that it has
    assert jitted.compiled == [kind]
    step.compile((jnp.ones(3), 1.0))
    assert jitted.compiled == [kind] * 2
    whole = graphs.OPTIONS["whole"]["xla_gpu_enable_command_buffer"].split(",")
    assert {"CONVOLUTION", "WHILE", "FUSION", "CUDNN"} <= set(whole)


@pytest.mark.parametrize("fastest", list(MS))
def test_auto_keeps_the_fastest_for_all_programs_of_the_run(clock, fastest, caplog):
    jitted, another = Jitted(clock, MS | {fastest: 0.5}), Jitted(clock)
    chosen = graphs.Graphs("auto", GPU)
    first, second = chosen.compiled(jitted), chosen.compiled(another)
    with caplog.at_level(logging.INFO, "bsce_jax"):
        assert first(jnp.ones(2), 1.0)[1] == fastest
    assert chosen.kind == fastest
    assert sorted(jitted.compiled) == sorted(MS)
    assert f"gpu_graphs={fastest}, ms a call: " in caplog.text
    assert f"{fastest} 0.5" in caplog.text
    assert second(jnp.ones(2), 1.0)[1] == fastest
    assert another.compiled == [fastest]  # not timed again


@pytest.mark.parametrize(("seconds", "tried"), [(14, 4), (19, 3), (29, 2), (61, 1)])
def test_auto_begins_nothing_that_could_end_after_its_time(clock, seconds, tried):
    """The kinds with most in graphs come first."""
    jitted = Jitted(clock, compile_seconds=seconds)
    chosen, _ = first_call(jitted)
    assert jitted.compiled == list(reversed(MS))[:tried]
    assert tried == 1 or clock[0] - 100 < graphs.SECONDS
    assert chosen.kind == "concurrent"


@pytest.mark.parametrize("how", ["broken", "failing"])
def test_auto_passes_over_what_does_not_work(clock, how, caplog):
    jitted = Jitted(clock, **{how: ("concurrent", "whole")})
    chosen, ran = first_call(jitted)
    assert ran == chosen.kind == "convolutions"
    assert "gpu_graphs=auto passes over concurrent: " in caplog.text
    assert "gpu_graphs=auto passes over whole: " in caplog.text
    nothing = Jitted(clock, **{how: tuple(MS)})
    with pytest.raises(jax.errors.JaxRuntimeError):
        first_call(nothing)


def test_a_kind_that_was_asked_for_and_does_not_compile_is_a_clear_line(clock):
    message = (
        "gpu_graphs='whole': this XLA does not compile with "
        "xla_gpu_enable_command_buffer (No such compile option: 'xla_gpu_x'); "
        "gpu_graphs=default leaves it its own choice"
    )
    with pytest.raises(UserError) as raised:
        first_call(Jitted(clock, broken=("whole",)), "whole")
    assert str(raised.value) == message


def test_this_xla_knows_the_options():
    """Also without a GPU it refuses names and values that it does not know."""
    lowered = jax.jit(lambda x: x + 1).lower(np.float32(1))
    for options in graphs.OPTIONS.values():
        assert float(lowered.compile(compiler_options=options)(np.float32(1))) == 2
    for wrong in ({"xla_gpu_no_such": "1"}, {graphs._LIST: "FUSION,NO_SUCH"}):
        with pytest.raises(jax.errors.JaxRuntimeError):
            lowered.compile(compiler_options=wrong)


@pytest.mark.parametrize(
    ("devices", "lacking"),
    [
        (parallel.create("jit"), "on a cpu"),
        (
            types.SimpleNamespace(platform="gpu", mode="pmap", num_processes=2),
            "with pmap on several hosts",
        ),
    ],
)
def test_nothing_changes_where_there_are_no_graphs_to_choose(devices, lacking):
    jitted = jax.jit(lambda x: x)
    for kind in ("auto", "default"):
        assert graphs.Graphs(kind, devices).compiled(jitted) is jitted
    for kind in set(graphs.OPTIONS) - {"default"}:
        wanted = f"config.gpu_graphs='{kind}': expected auto or default {lacking}"
        with pytest.raises(UserError) as caught:
            graphs.Graphs(kind, devices)
        assert str(caught.value) == wanted


def test_a_program_says_whether_it_was_compiled_before_its_call(clock):
    arguments = lambda: (jnp.zeros(()), jnp.ones(()))  # noqa: E731
    for kind, known in (("auto", False), ("whole", True)):
        chosen = graphs.Graphs(kind, GPU)
        update = chosen.compiled(Jitted(clock))
        assert update.compile(arguments()) is known
        update(*arguments())  # donates them
        assert update.compile(arguments()) is True


def test_the_configuration_has_every_kind():
    assert set(RUN["gpu_graphs"].choices) == {graphs.AUTO, *graphs.OPTIONS}
    with pytest.raises(UserError, match="gpu_graphs='all': expected one of auto, def"):
        graphs.Graphs("all", GPU)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_programs_of_both_compilers_can_be_timed(mode, monkeypatch):
    """Real ones, on devices that are called GPUs; the state is donated."""
    monkeypatch.setattr(parallel.Parallel, "platform", "gpu")
    two = {kind: graphs.OPTIONS[kind] for kind in ("default", "concurrent")}
    monkeypatch.setattr(graphs, "OPTIONS", two)
    place = parallel.create(mode, jax.devices()[:2])

    def update(state, rows, axis_name=None):
        total = parallel_sum(jnp.sum(rows), axis_name)
        return {"sum": state["sum"] + total}, total

    def parallel_sum(value, axis_name):
        return value if axis_name is None else jax.lax.psum(value, axis_name)

    chosen = graphs.Graphs("auto", place)
    step = chosen.compiled(
        parallel.compile_step(
            place,
            update,
            name="update",
            inputs=("replicated", "batch"),
            outputs=("replicated", "replicated"),
            donate=(0,),
        )
    )
    state = parallel.replicate(place, {"sum": 0.0})
    rows = parallel.shard(place, np.ones((1, 6), np.float32))
    for count in (1, 2):
        state, total = step(state, rows)
        assert float(state["sum"]) == 6 * count and float(total) == 6
    assert chosen.kind in graphs.OPTIONS
    assert float(step(parallel.replicate(place, state), rows)[0]["sum"]) == 18
