"""Networks: sizes, initialisation, options, parity with the authors' ResNet-32."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax import models
from bsce_jax.errors import UserError
from bsce_jax.models import convolution


def from_torch(state):
    """A PyTorch state dict of NumPy arrays as params and batch_stats.

    Understands the names of LUCIR's CIFAR networks and of torchvision's ResNets:
    conv1, bn1, layerI.J.{conv1,bn1,conv2,bn2,downsample.0,downsample.1}, fc (with the
    scale of a cosine head as sigma).
    """
    params, stats = {}, {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        if path == ["fc"]:
            kind = {"weight": "kernel", "sigma": "scale"}.get(leaf, leaf)
            params.setdefault("head", {})[kind] = (
                value[0] if leaf == "sigma" else value.T
            )
            continue
        if path[0].startswith("layer"):
            scope = [f"stage{path[0][5:]}_block{int(path[1]) + 1}"]
            layer = ".".join(path[2:])
            names = {"downsample.0": "shortcut", "downsample.1": "shortcut_norm"}
            names |= {"bn1": "conv1_norm", "bn2": "conv2_norm"}
            scope.append(names.get(layer, layer))
        else:
            scope = [{"conv1": "stem", "bn1": "stem_norm"}[path[0]]]
        tree = stats if leaf.startswith("running") else params
        for key in scope:
            tree = tree.setdefault(key, {})
        if value.ndim == 4:
            tree["kernel"] = value.transpose(2, 3, 1, 0)
        else:
            new = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
            tree[new.get(leaf, leaf)] = value
    return {"params": params, "batch_stats": stats}


def count(name, num_classes, **options):
    module = models.create(name, num_classes, **options)
    shapes = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((1, 32, 32, 3)), train=False),
        jax.random.key(0),
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def initialised(name="resnet8", shape=(4, 8, 8, 3), **options):
    module = models.create(name, 10, **({"width": 4} | options))
    images = jax.random.normal(jax.random.key(1), shape)
    state = jax.jit(lambda key: module.init(key, images, train=False))(
        jax.random.key(0, impl="unsafe_rbg")
    )
    return module, state, images


@functools.partial(jax.jit, static_argnums=0)
def evaluate(module, state, images):
    return module.apply(state, images, train=False)


@functools.partial(jax.jit, static_argnums=0)
def train(module, state, images):
    return module.apply(state, images, train=True, mutable=["batch_stats"])


def test_parameter_counts_of_the_published_networks():
    # PyCIL's ResNet-32 (option A), with its 10-way linear head.
    assert count("resnet32", 10, shortcut="A") == 464_154
    # LUCIR's: option B, 50 embeddings and one scale.
    assert count("resnet32", 50, head="cosine") == 469_457
    # torchvision.
    assert count("resnet18", 1000) == 11_689_512
    assert count("resnet34", 1000) == 21_797_672


def test_authors_resnet32(parity):
    data = parity("net_lucir_resnet32")
    state = {key[2:]: data[key] for key in data if key.startswith("p_")}
    variables = from_torch(state)
    module = models.create("resnet32", 50, final_relu=False, head="cosine")
    images = jnp.asarray(data["in_x"].transpose(0, 2, 3, 1))
    expected = jax.eval_shape(
        lambda key: module.init(key, images, train=False),
        jax.random.key(0, impl="unsafe_rbg"),
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, expected)
    assert shapes == jax.tree.map(np.shape, variables)

    logits, out = evaluate(module, variables, images)
    (logits_train, out_train), _ = train(module, variables, images)
    close = lambda a, b: np.testing.assert_allclose(  # noqa: E731
        a, b, rtol=1e-4, atol=1e-4
    )
    close(out["features"], data["out_eval_features"])
    close(logits, data["out_eval_logits"])
    close(out_train["features"], data["out_train_features"])
    close(logits_train, data["out_train_logits"])


@pytest.mark.parametrize("stem", ["7x7", "3x3"])
def test_resnet18_is_pytorch_s(stem):
    torch = pytest.importorskip("torch")
    module, state, images = initialised("resnet18", (4, 33, 33, 3), stem=stem)

    def tensor(array):
        array = np.asarray(array)
        axes = (3, 2, 0, 1) if array.ndim == 4 else range(array.ndim)
        return torch.from_numpy(array.transpose(*axes).copy())

    def layer(x, params, name, stride):
        weight = tensor(params[name]["kernel"])
        x = torch.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        norm = params[f"{name}_norm"]
        return torch.nn.functional.batch_norm(
            x, None, None, tensor(norm["scale"]), tensor(norm["bias"]), training=True
        )

    params = state["params"]
    x = torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())
    x = layer(x, params, "stem", 2 if stem == "7x7" else 1).relu()
    x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    for stage, index in itertools.product(range(1, 5), (1, 2)):
        block = params[f"stage{stage}_block{index}"]
        stride = 2 if stage > 1 and index == 1 else 1
        y = layer(layer(x, block, "conv1", stride).relu(), block, "conv2", 1)
        shortcut = layer(x, block, "shortcut", stride) if "shortcut" in block else x
        x = (y + shortcut).relu()
    features = x.mean((2, 3))
    want = features @ tensor(params["head"]["kernel"]) + tensor(params["head"]["bias"])
    (logits, out), _ = train(module, state, images)
    np.testing.assert_allclose(out["features"], features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_initialisation_is_pytorch_s():
    _, state, _ = initialised("resnet14", width=16)
    params = state["params"]
    kernel = np.asarray(params["stage3_block2"]["conv1"]["kernel"])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(kernel.size)
    # A truncated normal never leaves 2 deviations (5 per cent of a normal does).
    assert (abs(kernel) > 2.5 * kernel.std()).mean() == pytest.approx(0.0124, rel=0.2)
    shortcut = np.asarray(params["stage3_block1"]["shortcut"]["kernel"])
    assert shortcut.std() == pytest.approx(np.sqrt(2 / 64), rel=0.06)
    for leaf in (params["head"]["kernel"], params["head"]["bias"]):
        assert np.abs(leaf).max() <= 1 / 8
    assert np.std(params["head"]["kernel"]) == pytest.approx(
        1 / 8 / np.sqrt(3), rel=0.05
    )
    norms = params["stem_norm"], state["batch_stats"]["stem_norm"]
    assert (norms[0]["scale"] == 1).all() and (norms[0]["bias"] == 0).all()
    assert (norms[1]["mean"] == 0).all() and (norms[1]["var"] == 1).all()


@pytest.mark.parametrize(
    ("shape", "shortcut"), [((2, 8, 8, 1), "B"), ((2, 9, 12, 4), "A")]
)
def test_any_image_size_and_channel_count(shape, shortcut):
    module, state, images = initialised(shape=shape, shortcut=shortcut)
    logits, out = evaluate(module, state, images)
    assert logits.shape == (2, 10) and out["features"].shape == (2, 16)
    half = lambda n: -(-n // 2)  # noqa: E731
    height, width = shape[1:3]
    sizes = [(height, width), (half(height), half(width))]
    sizes.append((half(sizes[1][0]), half(sizes[1][1])))
    want = [(2, *size, 4 * 2**i) for i, size in enumerate(sizes)]
    assert [m.shape for m in out["maps"]] == want
    np.testing.assert_allclose(
        out["features"], out["maps"][-1].mean((1, 2)), rtol=1e-5, atol=1e-6
    )
    head = state["params"]["head"]
    np.testing.assert_allclose(
        logits, out["features"] @ head["kernel"] + head["bias"][None], atol=1e-5
    )


def test_option_a_subsamples_and_appends_zero_channels():
    block = models.resnet.BasicBlock(6, stride=2, shortcut="A", relu=False)
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    key = jax.random.key(0, impl="unsafe_rbg")
    state = jax.jit(lambda key: block.init(key, x, train=False))(key)
    params = state["params"] | {
        "conv2_norm": {"scale": jnp.zeros(6), "bias": jnp.zeros(6)}
    }
    got = block.apply(state | {"params": params}, x, train=False)
    np.testing.assert_array_equal(got[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(got[..., 3:], 0)


def test_without_the_final_relu_only_the_last_map_is_signed():
    module, state, images = initialised(final_relu=False)
    _, out = evaluate(module, state, images)
    assert [bool((m < 0).any()) for m in out["maps"]] == [False, False, True]
    assert (out["features"] < 0).any()
    module, state, images = initialised()
    _, out = evaluate(module, state, images)
    assert (out["maps"][-1] >= 0).all()


def test_bfloat16_compute_keeps_float32_state_and_outputs():
    module, state, images = initialised(dtype="bfloat16")
    reference, _, _ = initialised()
    (logits, out), updated = train(module, state, images)
    (want, _), stats = train(reference, state, images)
    leaves = jax.tree.leaves((state, updated, logits, out["features"]))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert {m.dtype for m in out["maps"]} == {jnp.dtype("bfloat16")}
    assert 0 < np.abs(logits - want).max() < 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02),
        updated,
        stats,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet33"}, ["model='resnet33'", "resnet32", "resnet18"]),
        ({"name": "resnet2"}, ["model='resnet2'", "resnet8"]),
        ({"name": "resnet1208"}, ["model='resnet1208'", "resnet8"]),
        ({"name": "podnet8"}, ["model='podnet8'", "podnet18", "podnet<6n+2>"]),
        ({"name": "podnet34"}, ["model='podnet34'", "podnet14"]),
        ({"name": "podnet"}, ["model='podnet'", "podnet32"]),
        ({"name": "vgg"}, ["model='vgg'", "resnet<6n+2>"]),
        ({"shortcut": "C"}, ["shortcut='C'", "A, B"]),
        ({"stem": "5x5"}, ["stem='5x5'", "7x7, 3x3"]),
        ({"head": "square"}, ["head='square'", "linear, cosine, local_similarity"]),
        ({"proxies": 0}, ["proxies=0", "at least 1"]),
        ({"dtype": "int8"}, ["dtype='int8'", "float32, bfloat16"]),
        ({"dtype": "fast"}, ["dtype='fast'", "float32, bfloat16"]),
        ({"width": 0}, ["width=0", "at least 1"]),
        ({"conv_chunks": 0}, ["conv_chunks=0", "at least 1"]),
        ({"num_classes": 2.5}, ["num_classes=2.5", "integer"]),
    ],
)
def test_a_wrong_option_is_one_clear_line(options, words):
    with pytest.raises(UserError) as error:
        models.create(**({"name": "resnet8", "num_classes": 10} | options))
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def plain_convolution(x, kernel, stride):
    """float64 loop over the window; padding of (size - 1) / 2 on every side."""
    size = kernel.shape[0]
    half = size // 2
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    height, width = (-(-(n - 2 * half) // stride) for n in x.shape[1:3])
    total = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i, j in itertools.product(range(size), range(size)):
        window = x[:, i : i + stride * height : stride, j : j + stride * width : stride]
        total += window[:, :height, :width] @ kernel[i, j]
    return total


@pytest.mark.parametrize("shape", [(5, 8, 8, 3), (7, 9, 6, 2)])
@pytest.mark.parametrize(("size", "stride"), [(1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_in_chunks_and_its_derivatives(x64, shape, size, stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape), rng.normal(size=(size, size, shape[-1], 4))
    want = plain_convolution(x, kernel, stride)
    directions = rng.normal(size=x.shape), rng.normal(size=kernel.shape)

    def derivatives(chunks):
        def loss(x, kernel):
            return jnp.sin(convolution.convolve(x, kernel, stride, chunks)).sum()

        gradient = jax.grad(loss, argnums=(0, 1))
        return gradient(x, kernel), jax.jvp(gradient, (x, kernel), directions)[1]

    reference = derivatives(1)
    for chunks in (1, 3, 100):
        got = convolution.convolve(jnp.asarray(x), jnp.asarray(kernel), stride, chunks)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            derivatives(chunks),
            reference,
        )


def test_chunks_are_for_a_single_cpu_device():
    assert convolution.default_chunks("cpu") > 1
    assert convolution.default_chunks("cpu", 8) == 1
    assert convolution.default_chunks("gpu") == 1
    assert convolution.default_chunks("tpu", 8) == 1
