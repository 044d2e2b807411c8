import json
import logging
import pathlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsce_jax.checkpoints import store
from bsce_jax.checkpoints.writer import Writer
from bsce_jax.errors import UserError

log = logging.getLogger(__name__)


@flax.struct.dataclass
class State:
    params: Any
    opt_state: Any
    alpha: jax.Array
    memory: np.ndarray
    name: str = flax.struct.field(pytree_node=False, default="run")


def make_state(seed: int, num_kept: int = 0) -> State:
    """Every kind of leaf a run has; some arrays big enough for a file of their own."""
    rng = np.random.default_rng(seed)
    params = {
        "conv": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 16, 32)), "float32")},
        "head": (jnp.asarray(rng.standard_normal((32, 100)), jnp.bfloat16),),
    }
    return State(
        params=params,
        opt_state=optax.sgd(optax.cosine_decay_schedule(0.1, 9), 0.9).init(params),
        alpha=jnp.float32(seed),
        memory=np.arange(num_kept, dtype=np.int32).reshape(num_kept, 1),
    )


def small(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(700, value, np.float32), "n": np.int32(value).reshape(())}


def assert_same(actual: Any, expected: Any) -> None:
    """Same structure, and leaves that are NumPy arrays with the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for have, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        want = np.asarray(want)
        assert type(have) is np.ndarray
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        assert have.tobytes() == want.tobytes()


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path: pathlib.Path, position: int) -> None:
    """Inverts bit ``position`` of a file."""
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def biggest_file(folder: pathlib.Path) -> pathlib.Path:
    return max(files_of(folder), key=lambda path: path.stat().st_size)


# --- Round trips


@pytest.mark.parametrize("abstract", [False, True])
def test_round_trip_keeps_bits_structure_and_meta(
    tmp_path: pathlib.Path, abstract: bool
) -> None:
    state = make_state(3, num_kept=5)
    meta = {"step": 1, "accuracy": [0.1, 1e-300, 1 / 3, None], "best": {"1": True}}
    store.save(tmp_path, 7, state, meta)

    target = make_state(0, num_kept=5)
    restored = store.latest(
        tmp_path, jax.eval_shape(lambda: target) if abstract else target
    )

    assert restored is not None and restored.number == 7
    assert restored.meta == meta == store.read_meta(tmp_path, 7)
    assert type(restored.arrays) is State
    assert type(restored.arrays.opt_state[1]) is type(state.opt_state[1])
    assert_same(restored.arrays, state)


def test_every_bit_pattern_survives(tmp_path: pathlib.Path) -> None:
    nans = np.array([0x7FC00001, 0xFF800001, 0x7F800000, 0x80000000, 1], np.uint32)
    tree = {
        "float32": nans.view(np.float32),
        "bfloat16": np.arange(65536, dtype=np.uint16).view(jnp.bfloat16),
        "bool": np.array([[True], [False]]),
        "uint32": np.array(2**32 - 1, np.uint32),
        "int32": np.array(-(2**31), np.int32),
        "uint8": np.arange(256, dtype=np.uint8),
        "strided": np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-1].T,
        "empty": np.zeros((0, 3), np.int32),
        "none": None,
        "key": np.asarray(jax.random.key_data(jax.random.key(5))),
    }
    store.save(tmp_path, 0, tree, {})
    assert_same(store.restore(tmp_path, 0, tree).arrays, tree)


def test_float64_survives(tmp_path: pathlib.Path, x64: None) -> None:
    tree = {"x": jnp.linspace(0, 1, 7, dtype=jnp.float64)}
    store.save(tmp_path, 0, tree, {})
    assert_same(store.restore(tmp_path, 0, tree).arrays, tree)


@pytest.mark.parametrize("tree", [{}, {"memory": np.zeros((0,), np.int32)}])
def test_trees_without_elements(tmp_path: pathlib.Path, tree: dict) -> None:
    store.save(tmp_path, 0, tree, {"a": 1})
    assert_same(store.restore(tmp_path, 0, tree).arrays, tree)


def test_replicated_arrays_of_a_mesh(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = {"x": jax.device_put(np.arange(3000.0, dtype=np.float32), everywhere)}
    store.save(tmp_path, 0, tree, {})
    assert_same(store.restore(tmp_path, 0, tree).arrays, tree)


def test_relative_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    store.save("a/b", 0, small(1), {})
    assert store.numbers("a/b") == [0]
    assert_same(store.restore("a/b", 0, small(0)).arrays, small(1))


def test_no_checkpoints(tmp_path: pathlib.Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert store.latest(folder, small(0)) is None
        assert store.numbers(folder) == []
    with pytest.raises(store.CheckpointError, match="no checkpoint 3"):
        store.read_meta(tmp_path, 3)


def test_partial_restore_reads_only_its_leaves(tmp_path: pathlib.Path) -> None:
    tree = {"state": small(3), "teacher": {"w": np.ones(5000, np.float32)}}
    store.save(tmp_path, 0, tree, {})
    part = {"state": {"w": tree["state"]["w"]}}
    assert_same(store.restore(tmp_path, 0, part, partial=True).arrays, part)
    with pytest.raises(store.CheckpointError, match="other is missing"):
        store.restore(tmp_path, 0, {"other": tree["state"]["w"]}, partial=True)


# --- Mistakes of the caller


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros(699, np.float32)}, r"w is float32\[700\], expected .*\[699\]"),
        ({"w": np.zeros(700, np.int32)}, r"w is float32\[700\], expected int32"),
        ({"more": np.zeros(1)}, "more is missing"),
        ({"n": {"n": np.zeros((), np.int32)}}, "n is not expected"),
    ],
)
def test_target_that_does_not_fit(
    tmp_path: pathlib.Path, change: dict, message: str, caplog: Any
) -> None:
    store.save(tmp_path, 0, small(0), {})
    store.save(tmp_path, 1, small(1), {})
    for read in (
        lambda target: store.latest(tmp_path, target),
        lambda target: store.restore(tmp_path, 1, target),
    ):
        with pytest.raises(store.CheckpointError, match=message) as caught:
            read(small(0) | change)
        assert not isinstance(caught.value, store.DamagedError)
        assert isinstance(caught.value, UserError)
    assert not caplog.records, "a wrong target is no damage"


def test_existing_and_lower_numbers_are_refused(tmp_path: pathlib.Path) -> None:
    store.save(tmp_path, 5, small(5), {})
    for number in (5, 4):
        with pytest.raises(store.CheckpointError, match="5 exists"):
            store.save(tmp_path, number, small(0), {})
    assert store.numbers(tmp_path) == [5]
    assert_same(store.restore(tmp_path, 5, small(0)).arrays, small(5))


@pytest.mark.parametrize(
    ("tree", "meta"),
    [
        ({"x": 1.0}, {}),
        ({"x": jax.random.key(0)}, {}),
        ({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}}, {}),
        ({"x": np.zeros(1)}, {"x": np.zeros(1)}),
    ],
)
def test_what_cannot_be_saved(tmp_path: pathlib.Path, tree: dict, meta: dict) -> None:
    with pytest.raises(TypeError):
        store.save(tmp_path, 0, tree, meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "keep"), [(-1, 2), (0, 0)])
def test_bad_numbers(tmp_path: pathlib.Path, number: int, keep: int) -> None:
    with pytest.raises(store.CheckpointError):
        store.save(tmp_path, number, small(0), {}, keep=keep)


# --- Pruning


def test_pruning_spares_permanent_and_newest(tmp_path: pathlib.Path) -> None:
    kept = []
    for number in range(9):
        store.save(tmp_path, number, small(number), {"permanent": number % 4 == 1})
        kept.append(store.numbers(tmp_path))
    # The newest two of all, and 1 and 5 for ever.
    assert kept[:3] == [[0], [0, 1], [1, 2]]
    assert kept[-3:] == [[1, 5, 6], [1, 5, 6, 7], [1, 5, 7, 8]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5", "7", "8"]
    store.save(tmp_path, 20, small(20), {}, keep=1)
    assert store.numbers(tmp_path) == [1, 5, 20]


def test_pruning_leaves_what_it_cannot_read(tmp_path: pathlib.Path) -> None:
    store.save(tmp_path, 0, small(0), {"permanent": True})
    (tmp_path / "0/manifest/data.json").write_text("{")
    for number in (1, 2, 3):
        store.save(tmp_path, number, small(number), {})
    assert store.numbers(tmp_path) == [0, 2, 3]


# --- Damage


@pytest.fixture
def two(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder with checkpoint 1 (of make_state(1)) and the newest, 2."""
    for number in (1, 2):
        store.save(tmp_path, number, make_state(number), {"number": number})
    yield tmp_path


def check_fallback(folder: pathlib.Path, caplog: Any) -> int:
    """``latest`` gives 2 bit-exactly and silently, or 1 with a warning about 2."""
    caplog.clear()
    restored = store.latest(folder, make_state(0))
    assert restored is not None
    assert restored.meta == {"number": restored.number}
    assert_same(restored.arrays, make_state(restored.number))
    warnings = [record.getMessage() for record in caplog.records]
    if restored.number == 2:
        assert warnings == []
    else:
        (warning,) = warnings
        assert f"checkpoint {folder / '2'} is damaged: " in warning
        assert "\n" not in warning
    return restored.number


def test_flipped_bits(two: pathlib.Path, caplog: Any) -> None:
    seed = random.randrange(2**32)
    log.warning("seed %d", seed)  # shown when the test fails
    rng = random.Random(seed)
    files = [path for path in files_of(two / "2") if path.stat().st_size]
    found = []
    for _ in range(20):
        path = rng.choice(files)
        position = rng.randrange(8 * path.stat().st_size)
        flip_bit(path, position)
        found.append(check_fallback(two, caplog))
        flip_bit(path, position)
    assert check_fallback(two, caplog) == 2
    assert 1 in found, f"20 flips, none detected: seed {seed}"


def test_flipped_bits_of_array_data_are_all_found(
    two: pathlib.Path, caplog: Any
) -> None:
    values = np.asarray(make_state(2).params["conv"]["kernel"]).tobytes()
    # The data of one array, in whichever file Orbax has put them.
    path = next(p for p in files_of(two / "2") if values in p.read_bytes())
    start = path.read_bytes().index(values)
    for position in random.Random(0).sample(range(8 * len(values)), 10):
        flip_bit(path, 8 * start + position)
        assert check_fallback(two, caplog) == 1
        assert "checksum of params/conv/kernel does not match" in caplog.text
        flip_bit(path, 8 * start + position)


@pytest.mark.slow
def test_truncated_and_missing_files(two: pathlib.Path, caplog: Any) -> None:
    found = {}
    for path in files_of(two / "2"):
        whole = path.read_bytes()
        for size in {0, len(whole) // 2}:
            path.write_bytes(whole[:size])
            found[path.name, size] = check_fallback(two, caplog)
        path.unlink()
        found[path.name, None] = check_fallback(two, caplog)
        path.write_bytes(whole)
    assert found["data.json", 0] == found["data.json", None] == 1
    assert found[biggest_file(two / "2").name, 0] == 1


def test_meta_is_protected(two: pathlib.Path, caplog: Any) -> None:
    path = two / "2/manifest/data.json"
    manifest = json.loads(path.read_text())
    manifest["meta"]["number"] = 3
    path.write_text(json.dumps(manifest))
    with pytest.raises(store.DamagedError, match="checksum of its JSON"):
        store.read_meta(two, 2)
    assert check_fallback(two, caplog) == 1


def test_swapped_folders_are_found(two: pathlib.Path) -> None:
    (two / "2").rename(two / "3")
    with pytest.raises(store.DamagedError, match="holds checkpoint 2"):
        store.restore(two, 3, make_state(0))


def test_all_damaged_is_an_error(two: pathlib.Path, caplog: Any) -> None:
    for number in ("1", "2"):
        biggest_file(two / number).write_bytes(b"")
    with pytest.raises(store.CheckpointError, match="none of the .* readable") as e:
        store.latest(two, make_state(0))
    assert "\n" not in str(e.value)
    assert len(caplog.records) == 2


def test_saving_again_after_a_fallback(two: pathlib.Path, caplog: Any) -> None:
    biggest_file(two / "2").write_bytes(b"")
    assert check_fallback(two, caplog) == 1
    store.save(two, 2, make_state(22), {"again": True})
    restored = store.latest(two, make_state(0))
    assert restored is not None and restored.meta == {"again": True}
    assert_same(restored.arrays, make_state(22))
    assert store.numbers(two) == [1, 2]
    assert (two / "2.damaged").exists(), "damaged data are kept for a rescue"


def test_leftovers_are_ignored_and_removed(two: pathlib.Path, caplog: Any) -> None:
    for name in ("3.orbax-checkpoint-tmp", "0.deleted"):
        (two / name / "arrays").mkdir(parents=True)
    assert check_fallback(two, caplog) == 2
    assert store.numbers(two) == [1, 2]
    store.save(two, 3, make_state(3), {})
    assert sorted(path.name for path in two.iterdir()) == ["2", "3"]


def test_only_the_first_process_writes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    store.save(tmp_path, 0, small(0), {})
    with Writer() as writer:
        writer.save(tmp_path, 0, small(0), {}, then=pytest.fail)
    assert list(tmp_path.iterdir()) == []


# --- In the background


def test_host_copies_share_no_memory() -> None:
    tree = {"w": jnp.zeros(300_000), "n": np.zeros(3)}
    copies = store.host_copy(tree)
    assert_same(copies, tree)
    for copy, leaf in zip(jax.tree.leaves(copies), jax.tree.leaves(tree), strict=True):
        assert not np.shares_memory(copy, jax.device_get(leaf))


def test_background_saves_are_of_their_moment(tmp_path: pathlib.Path) -> None:
    """Arrays may be donated, and meta changed, as soon as `save` returns."""

    @jax.jit
    def first() -> dict[str, jax.Array]:
        return {"w": jnp.zeros(300_000), "n": jnp.int32(0)}

    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, meta, written = first(), {"at": [0]}, []
    with Writer() as writer:
        for number in range(12):
            meta["at"][0] = number
            writer.save(tmp_path, number, state, meta, keep=12, then=written.append)
            for _ in range(5):
                state = update(state)
    assert [meta["at"] for meta in written] == [[number] for number in range(12)]
    assert writer.stalled > 0
    for number in range(12):
        restored = store.restore(tmp_path, number, state)
        assert restored.meta == {"at": [number]}
        assert (restored.arrays["w"] == 5 * number).all()
        assert restored.arrays["n"] == 5 * number


def test_one_background_save_at_a_time(tmp_path: pathlib.Path) -> None:
    gate, order = threading.Event(), []

    def hold(meta: dict) -> None:
        gate.wait(10)
        order.append("first")

    with Writer() as writer:
        writer.save(tmp_path, 0, small(0), {}, then=hold)
        writer.check()  # does not wait
        assert order == []
        threading.Timer(0.3, gate.set).start()
        writer.save(tmp_path, 1, small(1), {}, then=lambda _: order.append("second"))
        assert order[0] == "first" and writer.stalled >= 0.2
        writer.wait()
        assert order == ["first", "second"]
        assert store.numbers(tmp_path) == [0, 1]


def test_background_pruning(tmp_path: pathlib.Path) -> None:
    with Writer() as writer:
        for number in range(9):
            meta = {"permanent": number % 4 == 1}
            writer.save(tmp_path, number, small(number), meta)
    assert store.numbers(tmp_path) == [1, 5, 7, 8]


def fail_in_background(folder: pathlib.Path, writer: Writer) -> None:
    """Its save fails: the number is taken."""
    folder.mkdir(exist_ok=True)
    store.save(folder, 5, small(5), {})
    writer.save(folder, 5, small(6), {}, then=pytest.fail)


def test_background_errors_are_raised_once_by_the_next_call(
    tmp_path: pathlib.Path,
) -> None:
    writer = Writer()
    calls = {
        "wait": lambda folder: writer.wait(),
        "save": lambda folder: writer.save(folder, 6, small(6), {}),
        "exit": lambda folder: writer.__exit__(None, None, None),
    }
    for name, call in calls.items():
        fail_in_background(tmp_path / name, writer)
        with pytest.raises(store.CheckpointError, match="5 exists"):
            call(tmp_path / name)
        writer.check()
        writer.wait()
        assert store.numbers(tmp_path / name) == [5]


def test_check_raises_without_waiting(tmp_path: pathlib.Path) -> None:
    with Writer() as writer:
        fail_in_background(tmp_path, writer)
        with pytest.raises(store.CheckpointError, match="5 exists"):
            for _ in range(100):
                writer.check()
                threading.Event().wait(0.1)
        writer.save(tmp_path, 6, small(6), {})  # as if nothing had happened
    assert store.numbers(tmp_path) == [5, 6]


def test_errors_of_what_follows_a_save(tmp_path: pathlib.Path) -> None:
    def then(meta: dict) -> None:
        raise UserError("results.json cannot be written")

    with pytest.raises(UserError, match="results.json"), Writer() as writer:
        writer.save(tmp_path, 0, small(0), {}, then=then)
    assert store.numbers(tmp_path) == [0]


def test_background_errors_do_not_hide_others(
    tmp_path: pathlib.Path, caplog: Any
) -> None:
    with pytest.raises(ZeroDivisionError), Writer() as writer:
        fail_in_background(tmp_path, writer)
        raise ZeroDivisionError
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "cannot save checkpoint 5" in warning


@pytest.mark.parametrize(
    ("tree", "meta"), [({"x": 1.0}, {}), ({"x": np.zeros(1)}, {"x": np.zeros(1)})]
)
def test_what_cannot_be_copied(tmp_path: pathlib.Path, tree: dict, meta: dict) -> None:
    with Writer() as writer:
        with pytest.raises(TypeError):
            writer.save(tmp_path, 0, tree, meta)
    assert list(tmp_path.iterdir()) == []
