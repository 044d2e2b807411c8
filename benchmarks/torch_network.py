"""The networks and losses of the package in PyTorch, written to be fast there.

`speed.py --check` compares them with the package's: the same losses from the same
parameters. No value is fetched from the device and no size depends on one.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Outputs = dict[str, Any]


def convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    """Without bias, padded by (size - 1) / 2."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def batch_norm(features: int) -> nn.BatchNorm2d:
    """Without the counter of batches, which would cost a kernel a layer."""
    layer = nn.BatchNorm2d(features)
    layer.num_batches_tracked = None
    return layer


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: "A", padding, or "B", 1x1 convolution."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, shortcut: str, relu: bool
    ) -> None:
        """Modules are named as in the package's network."""
        super().__init__()
        self.stride, self.more, self.relu = stride, outputs - inputs, relu
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.conv1_norm = batch_norm(outputs)
        self.conv2 = convolution(outputs, outputs, 3, 1)
        self.conv2_norm = batch_norm(outputs)
        self.changed = stride != 1 or inputs != outputs
        if self.changed and shortcut == "B":
            self.shortcut = convolution(inputs, outputs, 1, stride)
            self.shortcut_norm = batch_norm(outputs)
        self.pads = self.changed and shortcut == "A"

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width]."""
        y = self.conv1_norm(self.conv1(x)).relu_()
        y = self.conv2_norm(self.conv2(y))
        if self.pads:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, 0, self.more))
        elif self.changed:
            x = self.shortcut_norm(self.shortcut(x))
        y += x
        return y.relu_() if self.relu else y


class Head(nn.Module):
    """Linear, cosine or local similarity head over the seen classes.

    Where the old rows are frozen they are no parameters: no gradient is computed.
    """

    old: Tensor

    def __init__(self, spec: Mapping[str, Any], features: int) -> None:
        """The kernel's last axis is that of the classes."""
        super().__init__()
        self.kind, self.proxies = spec["head"], spec["proxies"]
        inner = (self.proxies,) if self.kind == "local_similarity" else ()
        kernel = torch.randn(features, *inner, spec["seen"]) / features**0.5
        frozen = spec["old"] if spec["freeze_old_rows"] else 0
        self.register_buffer("old", kernel[..., :frozen].clone())
        self.new = nn.Parameter(kernel[..., frozen:].clone())
        if self.kind == "linear":
            self.bias = nn.Parameter(torch.zeros(spec["seen"]))
        else:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Outputs:
        """[batch, features] float32."""
        kernel = torch.cat((self.old, self.new), -1) if self.old.numel() else self.new
        if self.kind == "linear":
            return {"logits": torch.addmm(self.bias, features, kernel)}
        directions = F.normalize(kernel, dim=0)
        similarities = F.normalize(features, dim=1) @ directions.flatten(1)
        if self.kind == "local_similarity":
            near = (2 * similarities - 2).clamp(max=0)
            near = near.unflatten(1, (self.proxies, -1))
            similarities = (near.softmax(1) * near).sum(1)
        return {
            "logits": self.scale * similarities,
            "similarities": similarities,
            "scale": self.scale,
        }


class Network(nn.Module):
    """The CIFAR networks of the package, with its names of modules."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """Takes blocks, widths, shortcut and which blocks end with a ReLU."""
        super().__init__()
        widths, blocks = spec["widths"], spec["blocks"]
        self.stem, self.stem_norm = (
            convolution(3, widths[0], 3, 1),
            batch_norm(widths[0]),
        )
        self.stages, inputs = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), 1):
            names = [f"stage{stage}_block{block}" for block in range(1, count + 1)]
            for name, relu in zip(names, spec["relu"][stage - 1], strict=True):
                stride = 1 if inputs == width else 2
                block = Block(inputs, width, stride, spec["shortcut"], relu)
                self.add_module(name, block)
                inputs = width
            self.stages.append(names)
        self.head = Head(spec, widths[-1])
        self.autocast = spec["dtype"] == "bfloat16"

    def forward(self, x: Tensor) -> Outputs:
        """[batch, 3, height, width] -> what the losses look at."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            x, maps = self.stem_norm(self.stem(x)).relu_(), []
            for names in self.stages:
                for name in names:
                    x = getattr(self, name)(x)
                maps.append(x)
        features = x.float().mean((2, 3))
        return {"maps": maps, "features": features, **self.head(features)}


def softmax_ce(s: Outputs, t: Outputs, labels: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Cross-entropy under the log-prior."""
    return F.cross_entropy(s["logits"] + o["log_prior"], labels)


def kd(s: Outputs, t: Outputs, labels: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Distillation on the logits of the old classes."""
    old, temperature = o["old"], o["temperature"]
    targets = (t["logits"][:, :old] / temperature).softmax(1)
    log_p = (s["logits"][:, :old] / temperature).log_softmax(1)
    return -(temperature**2) * (targets * log_p).sum(1).mean()


def less_forget(s: Outputs, t: Outputs, labels: Tensor, o: Mapping[str, Any]) -> Tensor:
    """One minus the cosine of the features; POD-flat too."""
    ours, theirs = (F.normalize(x["features"], dim=1) for x in (s, t))
    return 1 - (ours * theirs).sum(1).mean()


def margin_ranking(
    s: Outputs, t: Outputs, labels: Tensor, o: Mapping[str, Any]
) -> Tensor:
    """Margin of old classes over the K nearest new ones, without boolean indexing."""
    cosines, old = s["similarities"], o["old"]
    nearest = cosines[:, old:].topk(min(o["k"], cosines.shape[1] - old), 1).values
    gap = nearest - cosines.gather(1, labels[:, None]) + o["margin"]
    is_old = labels < old
    return (gap.relu().mean(1) * is_old).sum() / is_old.sum().clamp(min=1)


def nca(s: Outputs, t: Outputs, labels: Tensor, o: Mapping[str, Any]) -> Tensor:
    """PODNet's classification loss as its authors coded it."""
    scores, label = s["logits"], labels[:, None]
    others = scores.scatter(1, label, scores.amax(1, keepdim=True))
    return (others.logsumexp(1) - scores.gather(1, label)[:, 0]).mean()


def pod_spatial(s: Outputs, t: Outputs, labels: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Distances of the maps pooled over width and over height."""

    def pooled(x: Tensor) -> Tensor:
        energy = x.float().square()
        return F.normalize(torch.cat((energy.sum(3), energy.sum(2)), 2).flatten(1))

    pairs = zip(s["maps"], t["maps"], strict=True)
    distances = [
        torch.linalg.vector_norm(pooled(a) - pooled(b), dim=1) for a, b in pairs
    ]
    return torch.stack(distances).mean()


TERMS = {
    "softmax_ce": softmax_ce,
    "kd": kd,
    "less_forget": less_forget,
    "pod_flat": less_forget,
    "margin_ranking": margin_ranking,
    "nca": nca,
    "pod_spatial": pod_spatial,
}


def load(network: Network, params: Mapping[str, Any], stats: Mapping[str, Any]) -> None:
    """Copies the package's parameters and running statistics, NumPy arrays."""
    found: dict[str, Tensor] = {}
    for module, values in walk(params):
        for name, value in values.items():
            array = torch.tensor(value)
            if module == "head":
                found |= head_entries(network.head, name, array)
            elif name == "kernel":
                found[f"{module}.weight"] = array.permute(3, 2, 0, 1)
            else:
                found[f"{module}.{'weight' if name == 'scale' else name}"] = array
    for module, values in walk(stats):
        for name, value in values.items():
            found[f"{module}.running_{name}"] = torch.tensor(value)
    if found.keys() != network.state_dict().keys():
        raise ValueError(f"not the same: {found.keys() ^ network.state_dict().keys()}")
    network.load_state_dict(found, strict=False)  # which adds counters of batches


def walk(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Mapping]]:
    """The innermost mappings of a tree, with dotted names."""
    if not any(isinstance(value, Mapping) for value in tree.values()):
        return [(path, tree)]
    found = []
    for name, value in tree.items():
        found += walk(value, f"{path}.{name}" if path else name)
    return found


def head_entries(head: Head, name: str, value: Tensor) -> dict[str, Tensor]:
    """The entries of a parameter of the head, without the rows of unseen classes."""
    frozen, trained = head.old.shape[-1], head.new.shape[-1]
    if name == "kernel":
        old, new, _ = value.split(
            (frozen, trained, value.shape[-1] - frozen - trained), -1
        )
        return {"head.old": old, "head.new": new}
    return {f"head.{name}": value[:trained] if value.ndim else value}
