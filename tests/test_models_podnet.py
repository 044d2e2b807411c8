"""PODNet's networks: structure, initialisation, equality with a PyTorch module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax import models
from bsce_jax.models.resnet import BasicBlock

# Blocks of each stage of podnet14 and podnet18.
BLOCKS = {14: (2, 2, 1, 1), 18: (2, 2, 2, 2)}


def shapes(name, size, num_classes=50, **options):
    """Parameters, and logits and the dict of 2 images, as ShapeDtypeStruct."""
    module = models.create(name, num_classes, **options)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(module.init, train=False), key, images)
    apply = functools.partial(module.apply, train=False)
    return state["params"], *jax.eval_shape(apply, state, images)


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.cache
def initialised(depth):
    """Module, variables and images; width 4, 16x16."""
    module = models.create(f"podnet{depth}", 10, width=4)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    state = jax.jit(lambda key: module.init(key, images, train=False))(
        jax.random.key(0, impl="unsafe_rbg")
    )
    return module, state, images


def perturbed(params):
    """Other parameters: at the start every residual branch is 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params
    )


@functools.partial(jax.jit, static_argnums=0)
def train(module, state, images):
    """Logits, the dict, and the outputs of the blocks by name."""
    (logits, out), updated = module.apply(
        state,
        images,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda layer, _: isinstance(layer, BasicBlock),
    )
    blocks = updated["intermediates"]
    return logits, out, {name: blocks[name]["__call__"][0] for name in blocks}


def test_podnet32_is_inclearn_s_rebuffi():
    params, _, out = shapes("podnet32", 32)
    # 463 504 in the original without the classifier.
    assert count({k: v for k, v in params.items() if k != "head"}) == 463_504
    assert count(params["head"]) == 64 * 50 + 50
    sizes = [(32, 16), (16, 32), (8, 64), (8, 64)]
    assert [m.shape for m in out["maps"]] == [(2, s, s, c) for s, c in sizes]
    assert out["features"].shape == (2, 64)
    blocks = [sum(name.startswith(f"stage{i}_") for name in params) for i in (1, 2, 3)]
    assert blocks == [5, 5, 4] and "stage4_block1" in params
    assert not any("shortcut" in block for block in params.values())


def test_podnet18_is_inclearn_s():
    params, _, out = shapes("podnet18", 64)
    # torchvision's 11 689 512 without its 1000-way classifier, a 3x3 stem for 7x7.
    backbone = 11_689_512 - (512 * 1000 + 1000) - (7 * 7 - 3 * 3) * 3 * 64
    assert count({k: v for k, v in params.items() if k != "head"}) == backbone
    sizes = [(32, 64), (16, 128), (8, 256), (4, 512)]
    assert [m.shape for m in out["maps"]] == [(2, s, s, c) for s, c in sizes]
    assert out["features"].shape == (2, 512)


def test_the_head_is_podnet_s_on_demand():
    params, _, out = shapes("podnet32", 32, head="local_similarity", proxies=7)
    assert params["head"]["kernel"].shape == (64, 7, 50)
    assert params["head"]["scale"].shape == ()
    assert out["similarities"].shape == (2, 50)
    params, *_ = shapes("podnet14", 8, head="local_similarity", width=4)
    assert params["head"]["kernel"].shape == (16, 10, 50)


@pytest.mark.parametrize("depth", [14, pytest.param(18, marks=pytest.mark.slow)])
def test_which_blocks_end_with_a_relu(depth):
    module, state, images = initialised(depth)
    state = state | {"params": perturbed(state["params"])}
    _, out, blocks = train(module, state, images)
    signed = {name for name, block in blocks.items() if (block < 0).any()}
    if depth == 14:
        assert signed == set(blocks)
    else:
        assert signed == {name for name in blocks if name.endswith("block2")}
    assert len(blocks) == sum(BLOCKS[depth])
    assert all((m < 0).any() for m in out["maps"]) and (out["features"] < 0).any()
    for stage, last in enumerate(BLOCKS[depth]):
        block = blocks[f"stage{stage + 1}_block{last}"]
        np.testing.assert_array_equal(out["maps"][stage], block)
    np.testing.assert_allclose(
        out["features"], out["maps"][-1].mean((1, 2)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("depth", BLOCKS)
def test_at_the_start_blocks_that_keep_the_shape_are_the_identity(depth):
    module, state, images = initialised(depth)
    for name, block in state["params"].items():
        if name.startswith("stage"):
            assert (block["conv2_norm"]["scale"] == 0).all()
            assert (block["conv1_norm"]["scale"] == 1).all()
            if "shortcut_norm" in block:
                assert (block["shortcut_norm"]["scale"] == 1).all()
    assert (state["params"]["stem_norm"]["scale"] == 1).all()
    _, out, blocks = train(module, state, images)
    maps = [np.asarray(m) for m in out["maps"]]
    assert all(np.ptp(m) > 0 for m in maps)
    for stage, last in enumerate(BLOCKS[depth]):
        for block in range(last):
            got = blocks[f"stage{stage + 1}_block{block + 1}"]
            np.testing.assert_array_equal(got, maps[stage])
    if depth == 14:
        np.testing.assert_array_equal(maps[3], maps[2])
        # Shortcut A: every other pixel, then zero channels.
        np.testing.assert_array_equal(maps[1][..., :4], maps[0][:, ::2, ::2])
        np.testing.assert_array_equal(maps[1][..., 4:], 0)


@pytest.mark.parametrize("depth", [32, 18])
def test_a_pytorch_module_gives_the_same(depth):
    torch = pytest.importorskip("torch")
    relu = torch.nn.functional.relu
    module, state, images = initialised(depth)
    params = perturbed(state["params"])

    class Layer(torch.nn.Sequential):
        """Convolution and normalisation with the weights of a layer of ours."""

        def __init__(self, scope, name, stride=1):
            kernel = np.asarray(scope[name]["kernel"]).transpose(3, 2, 0, 1)
            wide, narrow, size, _ = kernel.shape
            conv = torch.nn.Conv2d(narrow, wide, size, stride, size // 2, bias=False)
            norm = torch.nn.BatchNorm2d(wide)
            super().__init__(conv, norm)
            values = {"0.weight": kernel}
            values["1.weight"] = scope[f"{name}_norm"]["scale"]
            values["1.bias"] = scope[f"{name}_norm"]["bias"]
            tensors = {k: torch.tensor(np.array(v)) for k, v in values.items()}
            self.load_state_dict(tensors, strict=False)

    def block(x, scope, stride, last_relu):
        y = relu(Layer(scope, "conv1", stride)(x))
        y = Layer(scope, "conv2")(y)
        if stride == 2 and depth == 18:
            x = Layer(scope, "shortcut", 2)(x)
        elif stride == 2:
            x = x[:, :, ::2, ::2]
            x = torch.cat((x, torch.zeros_like(x)), dim=1)
        return relu(x + y) if last_relu else x + y

    x = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))
    maps = []
    with torch.no_grad():
        x = relu(Layer(params, "stem")(x))
        if depth == 18:
            x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        for stage, length in enumerate((2, 2, 2, 2) if depth == 18 else (5, 5, 4, 1)):
            grows = stage > 0 and (depth == 18 or stage < 3)
            for i in range(length):
                scope = params[f"stage{stage + 1}_block{i + 1}"]
                stride = 2 if grows and i == 0 else 1
                x = block(x, scope, stride, last_relu=depth == 18 and i == 0)
            maps.append(x.permute(0, 2, 3, 1).numpy())
        features = x.mean((2, 3)).numpy()
    _, out, _ = train(module, state | {"params": params}, images)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, out["maps"], maps)
    close(out["features"], features)


def test_bfloat16_compute_keeps_float32_features_and_logits():
    options = {"head": "local_similarity", "dtype": "bfloat16"}
    params, logits, out = shapes("podnet14", 32, **options)
    assert {m.dtype for m in out.pop("maps")} == {jnp.dtype("bfloat16")}
    leaves = jax.tree.leaves((params, logits, out))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["podnet14", "podnet18"])
def test_options_of_the_plain_networks_do_not_apply(name):
    plain = models.create(name, 10)
    other = {"shortcut": "A", "final_relu": False, "stem": "3x3"}
    assert models.create(name, 10, **other) == plain
    assert models.create(name, 10, width=8) != plain
