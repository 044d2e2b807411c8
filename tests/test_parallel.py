"""Placing arrays on devices and fetching them, and the two compilers."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel
from bsce_jax.errors import UserError
from bsce_jax.telemetry import compiles

MODES = ("jit", "pmap")
WHOLE, ROWS = "replicated", "batch"


def example(rows: int, updates: int = 2) -> dict:
    """Leaves [updates, rows, ...] of several types, without a zero."""
    numbers = 1 + np.arange(updates * rows * 6).reshape(updates, rows, 2, 3)
    return {
        "images": numbers.astype(np.uint8 if rows < 20 else np.int32),
        "weights": numbers[:, :, 0, 0].astype(np.float32),
        "nested": (numbers[..., 0].astype(np.int32),),
    }


def joined(mode, leaf):
    """The rows of a placed batch in one axis."""
    value = np.asarray(leaf)
    return value.reshape(len(value), -1, *value.shape[3:]) if mode == "pmap" else value


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 24])
def test_sharded_rows_keep_their_order_and_are_filled_with_zeros(mode, devices, rows):
    place = parallel.create(mode, jax.devices()[:devices])
    tree = example(rows)
    sharded = parallel.shard(place, tree)
    filled = jax.tree.map(functools.partial(joined, mode), sharded)
    assert jax.tree.structure(filled) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(a[:, :rows], b)
        assert a.dtype == b.dtype
        assert not a[:, rows:].any()  # zeros: not valid
    each = -(-rows // devices)
    shape = (2, devices, each) if mode == "pmap" else (2, devices * each)
    for leaf in jax.tree.leaves(sharded):
        assert leaf.shape[: len(shape)] == shape
        sizes = {s.data.size for s in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == devices
        assert sizes == {leaf.size // devices}
    own = parallel.local_rows(place, rows)
    np.testing.assert_array_equal(own, np.arange(devices * each))
    again = parallel.shard_own(place, filled)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(sharded), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_one_process_agrees_with_itself():
    place = parallel.create("jit")
    np.testing.assert_array_equal(parallel.largest(place, (3, False, True)), [3, 0, 1])
    assert place.num_processes == 1 and parallel.is_first()


def test_rows_stay_in_order_over_the_devices():
    """Device d has the d-th part of the rows, in both modes."""
    for mode in MODES:
        place = parallel.create(mode, jax.devices()[:4])
        sharded = parallel.shard(place, np.arange(12)[None])
        by_device = {s.device: s.data for s in sharded.addressable_shards}
        for number, device in enumerate(jax.devices()[:4]):
            own = np.asarray(by_device[device]).reshape(-1)
            np.testing.assert_array_equal(own, 3 * number + np.arange(3))


@pytest.mark.parametrize("mode", MODES)
def test_replicate_puts_everything_whole_and_strongly_typed_everywhere(mode):
    place = parallel.create(mode)
    tree = {
        "float": 0.5,
        "int": 3,
        "bool": True,
        "double": np.arange(3.0),
        "long": np.arange(3),
        "half": np.ones(2, jnp.bfloat16),
        "empty": (),
    }
    found = parallel.replicate(place, tree)
    expected = {
        "float": np.float32,
        "int": np.int32,
        "bool": np.bool_,
        "double": np.float32,
        "long": np.int32,
        "half": jnp.bfloat16,
    }
    assert {name: found[name].dtype for name in expected} == expected
    assert found["empty"] == ()
    for name in expected:
        leaf = found[name]
        assert not leaf.weak_type and leaf.sharding.is_fully_replicated
        assert len(leaf.addressable_shards) == place.num_devices == 8
        np.testing.assert_array_equal(leaf, np.asarray(tree[name]))
    again = parallel.replicate(place, found)
    assert all(again[name] is found[name] for name in expected)


def test_replicate_keeps_64_bits_where_jax_has_them(x64):
    place = parallel.create("jit")
    found = parallel.replicate(place, (0.1, 2**40))
    assert [leaf.dtype for leaf in found] == [np.float64, np.int64]
    assert float(found[0]) == 0.1 and int(found[1]) == 2**40


def test_replicate_copies_what_the_caller_may_change_or_reuse():
    place = parallel.create("jit", jax.devices()[:1])
    array = np.arange(4096, dtype=np.float32)
    placed = parallel.replicate(place, array)
    expected = array.copy()
    array += 1
    np.testing.assert_array_equal(placed, expected)


def scaled_sums(scale, shift, rows, axis_name=None):
    """Total of the valid rows [updates] and rows scaled: one output of each kind."""
    values = scale * rows["values"] + shift["by"]
    total = jnp.sum(values * rows["valid"], axis=1)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return {"total": total}, values


def compiled(mode, devices=8, **options):
    place = parallel.create(mode, jax.devices()[:devices])
    step = parallel.compile_step(
        place,
        scaled_sums,
        name="scaled_sums_program",
        inputs=(WHOLE, WHOLE, ROWS),
        outputs=(WHOLE, ROWS),
        **options,
    )
    return place, step


def batch(rows: int, seed: int = 0) -> dict:
    values = np.random.default_rng(seed).normal(size=(2, rows)).astype(np.float32)
    return {"values": values, "valid": np.ones_like(values)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("devices", "rows"), [(1, 5), (3, 11), (8, 8), (8, 3)])
def test_inputs_and_outputs_of_both_kinds(mode, devices, rows):
    place, step = compiled(mode, devices)
    given = batch(rows)
    totals, values = step(
        parallel.replicate(place, 2.0),
        parallel.replicate(place, {"by": 0.5}),
        parallel.shard(place, given),
    )
    expected = 2 * given["values"] + 0.5
    np.testing.assert_allclose(totals["total"], expected.sum(axis=1), rtol=1e-5)
    assert totals["total"].shape == (2,)
    assert totals["total"].sharding.is_fully_replicated
    fetched = parallel.fetch(values, rows)
    np.testing.assert_allclose(fetched, expected, rtol=1e-6)


def test_the_name_of_the_program_is_counted_under_jit():
    counts = compiles.compile_counter()
    place, step = compiled("jit")
    shift = parallel.replicate(place, {"by": 0.5})
    rows = parallel.shard(place, batch(8))
    step(parallel.replicate(place, 2.0), shift, rows)
    assert counts == {"scaled_sums_program": 1}
    assert step.__name__ == "scaled_sums_program"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("devices", [1, 8])
def test_nothing_compiles_again_whatever_the_values_were_made_of(
    mode, devices, tmp_path
):
    place, step = compiled(mode, devices)
    shift = {"by": np.float32(0.5)}

    def call(scale, seed, shift=shift):
        totals, values = step(
            parallel.replicate(place, scale),
            parallel.replicate(place, shift),
            parallel.shard(place, batch(8, seed)),
        )
        return totals, parallel.fetch(values, 8)

    totals, _ = call(np.float32(2.0), 0)
    store.save(tmp_path, 0, {"scale": np.float32(3.0)}, {}, keep=1)
    target = {"scale": jax.ShapeDtypeStruct((), np.float32)}
    restored = store.restore(tmp_path, 0, target).arrays["scale"]
    elsewhere = jax.device_put(np.float32(4.0), jax.devices()[-1])
    weak = jax.jit(lambda: 1.5, out_shardings=totals["total"].sharding)()
    assert weak.weak_type
    counts = compiles.compile_counter()
    for scale in (
        2.5,
        np.float64(2.5),
        np.asarray(2.5, np.float32),
        restored,
        elsewhere,
        jax.device_get(totals["total"])[0],
        parallel.replicate(place, 7.0),
        weak,
    ):
        found, _ = call(scale, 1)
        expected = float(scale) * batch(8, 1)["values"] + 0.5
        np.testing.assert_allclose(
            found["total"], expected.sum(axis=1), rtol=1e-4, atol=1e-4
        )
    call(2.5, 1, {"by": 0.25})
    assert not counts, counts


@pytest.mark.parametrize("mode", MODES)
def test_an_output_goes_in_again_without_another_compile(mode):
    """A state as training carries it from call to call, its buffers reused."""
    place = parallel.create(mode)

    def step(state, rows, axis_name=None):
        total = jnp.sum(rows)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        return {"sum": state["sum"] + total, "count": state["count"] + 1}, total

    program = parallel.compile_step(
        place,
        step,
        name="accumulate",
        inputs=(WHOLE, ROWS),
        outputs=(WHOLE, WHOLE),
        donate=(0,),
    )
    rows = parallel.shard(place, np.ones((1, 11), np.float32))
    first = parallel.replicate(place, {"sum": 0.0, "count": 0})
    state, _ = program(first, rows)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    counts = compiles.compile_counter()
    for _ in range(3):
        state, _ = program(parallel.replicate(place, state), rows)
    assert not counts, counts
    assert float(state["sum"]) == 44 and int(state["count"]) == 4


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="parallel='xmap': expected jit or pmap"):
        parallel.create("xmap")


def test_devices_and_platform():
    assert parallel.create("pmap").num_devices == jax.device_count() == 8
    two = parallel.create("jit", jax.devices()[2:4])
    assert (two.num_devices, two.platform, two.mode) == (2, "cpu", "jit")
    assert list(two.mesh.devices.flat) == jax.devices()[2:4]


def test_processes_that_differ_are_named(monkeypatch):
    parallel.require_same({"configuration": 1})  # one process has nobody to differ from
    others = {"configuration": ["a", "b", "b"], "data set": ["c", "c", "c"]}

    def gather(mine):
        assert mine.shape == (2, 32) and mine.dtype == np.uint8
        digests = [
            [
                hashlib.sha256(repr(facts[i]).encode()).digest()
                for facts in others.values()
            ]
            for i in range(3)
        ]
        found = np.array([[list(d) for d in ds] for ds in digests], np.uint8)
        np.testing.assert_array_equal(found[0], mine)
        return found

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(parallel.multihost_utils, "process_allgather", gather)
    message = "process 1 has another configuration than process 0: expected the same on"
    with pytest.raises(UserError, match=message):
        parallel.require_same({"configuration": "a", "data set": "c"})
    others["configuration"] = ["a"] * 3
    parallel.require_same({"configuration": "a", "data set": "c"})
