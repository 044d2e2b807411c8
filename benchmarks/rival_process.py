"""The process in which PyTorch runs the rivals, seen from ours."""

import contextlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from problem import Contestant


class RivalError(Exception):
    """A rival, or PyTorch as a whole, cannot be run here."""


class Rivals:
    """A process of torch_rivals.py."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """Starts it."""
        script = pathlib.Path(__file__).with_name("torch_rivals.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self._facts: dict[str, Any] = self._ask(json.dumps(spec))
        self._rounds: dict[str, dict[str, Any]] = {}

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended: no answer either
            print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RivalError(f"PyTorch ended with status {self._process.wait()}")
        return json.loads(answer)

    def contestant(self, name: str) -> Contestant:
        """A variant; a round raises RivalError where it cannot be run."""

        def round_() -> tuple[float, float]:
            found = self._ask(name)
            self._rounds.setdefault(name, {}).update(found)
            if "error" in found:
                raise RivalError(found["error"])
            return found["seconds"], found["amount"]

        return round_

    def known(self, rates: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What is known of the process and of each variant, with its rate."""
        variants = {}
        for name, found in self._rounds.items():
            facts = {k: v for k, v in found.items() if k not in ("seconds", "amount")}
            if f"torch/{name}" in rates:
                facts["per_s"] = float(f"{np.median(rates[f'torch/{name}']):.4g}")
            variants[name] = facts
        return {**self._facts, "variants": variants}

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
