"""The same incremental step in PyTorch, in a process of its own.

speed.py starts it, so that neither library meets the other's threads and memory. The
first line of standard input is JSON, the problem (see `speed.rival_spec`); then each
line names a way to do it, and the answer is a line of JSON, {"seconds", "amount",
"unit", ...} of one round:

    eager                    the training step, data resident, augmented on the device
    compile-default          the same with torch.compile
    compile-reduce-overhead  the same with CUDA graphs
    loader                   an epoch from a DataLoader: Pillow transforms in as many
                             workers as cores, the eager training step
    evaluate                 predictions in evaluation mode, data resident
    herding                  features in evaluation mode, herding in NumPy

All channels_last, bfloat16 by autocast or TF32 on CUDA, fused SGD, and no value fetched
before the end of a round. Standard error takes what PyTorch prints.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch_network
from PIL import Image, ImageOps
from torch import Tensor, nn

WARM_UP = 5  # steps; a CUDA graph is recorded in the second or third
MOMENTUM = 0.9


class Rival:
    """Student, teacher, optimiser and resident data of a problem."""

    def __init__(self, spec: Mapping[str, Any], device: str) -> None:
        """Random networks and images."""
        self.spec, self.device = spec, device
        self.student, self.teacher = (self._network() for _ in range(2))
        self.teacher.eval().requires_grad_(False)
        self.log_prior = torch.tensor(spec["log_prior"], device=device)
        self.trained = list(self.student.parameters())
        self.optimizer = torch.optim.SGD(
            self.trained,
            spec["rate"],
            MOMENTUM,
            weight_decay=spec["weight_decay"],
            fused=True,
        )
        rng, pixels = np.random.default_rng(0), spec["pixels"]
        shape = (spec["images"], pixels, pixels, 3)
        self.images = rng.integers(0, 256, shape, np.uint8)
        self.labels = rng.integers(0, spec["seen"], len(self.images))
        edge = spec["padding"]
        border = ((0, 0), (edge, edge), (edge, edge), (0, 0))
        self.padded = torch.from_numpy(np.pad(self.images, border)).to(device)
        self.targets = torch.from_numpy(self.labels).to(device)
        self.mean, self.std = (
            torch.tensor(spec[k], device=device) for k in ("mean", "std")
        )
        self.pixels = torch.arange(pixels, device=device)
        self._losses: dict[str, Callable[..., Tensor]] = {}
        self._loader: Any = None

    def _network(self) -> Any:
        network: Any = torch_network.Network(self.spec)
        return network.to(self.device, memory_format=torch.channels_last)

    def objective(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch [batch, 3, height, width]."""
        with torch.no_grad():
            theirs = self.teacher(x)
        ours = self.student(x)
        known = {"log_prior": self.log_prior, "old": self.spec["old"]}
        parts = [
            term["weight"]
            * torch_network.TERMS[name](ours, theirs, labels, known | term)
            for name, term in self.spec["terms"].items()
        ]
        return torch.stack(parts).sum()

    def augmented(
        self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor
    ) -> Tensor:
        """Crops, mirrors and normalises resident images, each vector [batch, 1]."""
        rows, columns = top + self.pixels, self.pixels
        columns = left + torch.where(flip, columns.flip(0), columns)
        crops = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ((crops.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def resident_loss(self, index: Tensor, *random_numbers: Tensor) -> Tensor:
        """The loss of a batch of resident images."""
        return self.objective(
            self.augmented(index, *random_numbers), self.targets[index]
        )

    def update(self, loss: Tensor) -> None:
        """Backward and SGD."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.spec["clip"]:
            nn.utils.clip_grad_value_(self.trained, self.spec["clip"])
        self.optimizer.step()

    def train(self, variant: str, steps: int) -> int:
        """Runs training steps and waits; returns the images."""
        if variant not in self._losses:
            _, _, mode = variant.partition("compile-")
            plain = self.resident_loss
            self._losses[variant] = torch.compile(plain, mode=mode) if mode else plain
        loss_of, batch = self._losses[variant], self.spec["batch"]
        self.student.train()
        done = 0
        while done < steps:
            order = torch.randperm(len(self.targets), device=self.device)
            for index in order.split(batch)[: steps - done]:
                if len(index) < batch:
                    continue
                shifts = torch.randint(
                    2 * self.spec["padding"] + 1, (2, batch, 1), device=self.device
                )
                flip = torch.rand(batch, 1, device=self.device) < 0.5
                torch.compiler.cudagraph_mark_step_begin()
                loss = loss_of(index, *shifts, flip)
                self.update(loss)
                done += 1
        finite(loss)
        return steps * batch

    def epoch(self, variant: str) -> int:
        """An epoch from the DataLoader, whose workers persist; returns the images."""
        if self._loader is None:
            self._loader = torch.utils.data.DataLoader(
                PillowImages(self),
                self.spec["batch"],
                shuffle=True,
                num_workers=len(os.sched_getaffinity(0)),
                pin_memory=self.device == "cuda",
                persistent_workers=True,
            )
        self.student.train()
        for x, labels in self._loader:
            x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            loss = self.objective(x, labels.to(self.device, non_blocking=True))
            self.update(loss)
        finite(loss)
        return len(self.labels)

    @torch.no_grad()
    def outputs(self, images: int) -> tuple[Tensor, Tensor]:
        """Predictions [images] and features of resident images, evaluation mode."""
        self.student.eval()
        edge, pixels, found = self.spec["padding"], self.spec["pixels"], []
        for first in range(0, images, self.spec["evaluation_batch"]):
            last = min(images, first + self.spec["evaluation_batch"])
            index = torch.arange(first, last, device=self.device) % len(self.targets)
            x = self.padded[index, edge : edge + pixels, edge : edge + pixels]
            x = ((x.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
            answer = self.student(x)
            found.append((answer["logits"].argmax(1), answer["features"]))
        predicted, features = zip(*found, strict=True)
        return torch.cat(predicted), torch.cat(features)

    def evaluate(self, variant: str) -> int:
        """Predicts the test images; returns how many."""
        predicted, _ = self.outputs(self.spec["tests"])
        return len(predicted.cpu())

    def herding(self, variant: str) -> int:
        """Chooses the exemplars of the new classes; returns how many classes."""
        classes, images = self.spec["seen"] - self.spec["old"], self.spec["per_class"]
        for _ in range(classes):
            herd(self.outputs(images)[1].cpu().numpy(), self.spec["exemplars"])
        return classes


class PillowImages(torch.utils.data.Dataset):
    """CIFAR's arrays through the transforms of torchvision, as Pillow does them."""

    def __init__(self, rival: Rival) -> None:
        """Random crop with padding, mirroring, tensor, normalisation."""
        self.images, self.labels = rival.images, rival.labels
        self.padding = rival.spec["padding"]
        self.mean, self.std = (
            torch.tensor(rival.spec[k]).view(-1, 1, 1) for k in ("mean", "std")
        )

    def __len__(self) -> int:
        """Images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """[3, height, width] float32 and the label."""
        image = Image.fromarray(self.images[index])
        size = image.size[0]
        image = ImageOps.expand(image, self.padding)
        left, top = (random.randint(0, 2 * self.padding) for _ in range(2))
        image = image.crop((left, top, left + size, top + size))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        x = x.float().div_(255).sub_(self.mean).div_(self.std)
        return x, int(self.labels[index])


def herd(features: np.ndarray, count: int) -> list[int]:
    """Herding as LUCIR's authors loop over it: at most 1000 picks."""
    points = (features / np.linalg.norm(features, axis=1, keepdims=True)).T
    mean = points.mean(1)
    direction, chosen = mean, []
    for _ in range(1000):
        best = int(np.argmax(direction @ points))
        if best not in chosen:
            chosen.append(best)
        if len(chosen) == count:
            break
        direction = direction + mean - points[:, best]
    return chosen


def finite(loss: Tensor) -> None:
    """Waits for the device; ends the process if the loss is not finite."""
    if not loss.isfinite():
        sys.exit("error: PyTorch's loss is not finite")


def losses(
    spec: Mapping[str, Any],
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    updates: int,
) -> list[float]:
    """The losses of updates on one batch, from the package's parameters.

    Args:
      spec: of the problem.
      student: {"params", "batch_stats"} of NumPy arrays.
      teacher: likewise.
      images: [batch, height, width, 3] float32, normalised.
      labels: [batch].
      updates: how many.
    """
    rival = Rival(spec, "cpu")
    for network, values in ((rival.student, student), (rival.teacher, teacher)):
        torch_network.load(network, values["params"], values["batch_stats"])
    rival.student.train()
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    targets, found = torch.from_numpy(labels.astype(np.int64)), []
    for _ in range(updates):
        loss = rival.objective(x, targets)
        rival.update(loss)
        found.append(float(loss.detach()))
    return found


def answer(rival: Rival, variant: str, started: set[str]) -> dict[str, Any]:
    """Runs a round of a variant; before its first also what warms it up."""
    steps, other = rival.spec["steps"], {"loader": rival.epoch}
    other |= {"evaluate": rival.evaluate, "herding": rival.herding}
    run = other.get(variant, lambda name: rival.train(name, steps))
    found: dict[str, Any] = {}
    if variant not in started:
        started.add(variant)
        start = time.perf_counter()
        if variant in other:
            run(variant)
        else:
            rival.train(variant, WARM_UP)
        found["warm_up_s"] = round(time.perf_counter() - start, 1)
        if rival.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found["amount"] = run(variant)
    found["seconds"] = time.perf_counter() - start
    if rival.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    """Answers the lines of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    spec = json.loads(sys.stdin.readline())
    device = "cpu" if spec["cpu"] else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    rival, started = Rival(spec, device), set[str]()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts = {"torch": torch.__version__, "device": name}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        try:
            found = answer(rival, line.strip(), started)
        except Exception as error:  # of torch.compile, mostly
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
