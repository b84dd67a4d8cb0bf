"""How each engine loads a network and is called; this module imports an engine only where it is used.

Every call takes images as a NumPy array (N, C, H, W), float32, and returns scores as an array, so conversions of
layout and number type are a part of its time.
"""

import dataclasses
import json
import os
from abc import ABC, abstractmethod
from typing import Any

from nin.engines.sessions import Call, onnxruntime_call, onnxruntime_session, openvino_call, openvino_request


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is chosen by measuring, for each engine and batch size.

    Attributes:
        threads: of the engine.
        layout: of the weights and images in PyTorch, "contiguous" or "channels_last"; "" where the engine chooses.
    """

    threads: int
    layout: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """What a process loads.

    Attributes:
        engine: a name in `nin.engines.catalog.ENGINES`.
        number: "float32", "bfloat16" or "int8".
        path: a file of ONNX or OpenVINO, or a folder for `nin.speed_search.networks.load_network`.
        input_shape: (C, H, W).
        batches: images at a time, ascending.
        mean: of each channel, for values from 0 to 1.
        std: the same.
        threads: to be used; the fastest number is looked for if not given.
        settings: by batch size, those that were found before.
        trust: import somebody's module where the network is made by it.
    """

    engine: str
    number: str
    path: str
    input_shape: tuple[int, int, int]
    batches: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threads: int | None = None
    settings: dict[int, Setting] = dataclasses.field(default_factory=dict)
    trust: bool = False

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "WorkerSpec":
        """Return what `to_json` wrote."""
        values = json.loads(text)
        for name in ("input_shape", "batches", "mean", "std"):
            values[name] = tuple(values[name])
        values["settings"] = {int(batch): Setting(**setting) for batch, setting in values["settings"].items()}
        return cls(**values)


class Runner(ABC):
    """A loaded network in one engine.

    Args:
        spec: what to load.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec

    def candidates(self) -> list[Setting]:
        """Return the settings to choose among, the usual one first."""
        return [Setting(threads) for threads in self.thread_counts()]

    def thread_counts(self) -> list[int]:
        """Return the numbers of threads to choose among: all, half (one for each core of two threads), one."""
        if self.spec.threads is not None:
            return [self.spec.threads]
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return sorted({usable, max(1, usable // 2), 1}, reverse=True)

    @abstractmethod
    def bind(self, x: Any, setting: Setting) -> Call:
        """Return the call for an input, to be made while `use` was last called with the same setting."""

    def use(self, setting: Setting) -> None:  # noqa: B027  (most engines have nothing to do)
        """Set what is global in an engine."""


class TorchRunner(Runner):
    """PyTorch, as it is."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        import torch

        from nin.runtime.device import keep_freed_memory
        from nin.speed_search.networks import load_network

        keep_freed_memory()
        self.torch = torch
        self.dtype = getattr(torch, spec.number)
        self.model = load_network(spec.path, plain=self.is_plain, trust=spec.trust).to(self.dtype).eval()
        self.model.requires_grad_(False)
        self.models: dict[Any, Any] = {}

    is_plain = True

    def candidates(self) -> list[Setting]:
        """Return every number of threads with both layouts."""
        return [Setting(n, layout) for layout in ("channels_last", "contiguous") for n in self.thread_counts()]

    def prepared(self, x: Any, setting: Setting) -> Any:
        """Return the model in a layout; it is kept."""
        if setting.layout not in self.models:
            from nin.runtime.model_copy import copy_model

            self.models[setting.layout] = copy_model(self.model).to(memory_format=self.memory_format(setting))
        return self.models[setting.layout]

    def memory_format(self, setting: Setting) -> Any:
        """Return PyTorch's name of a layout."""
        return self.torch.channels_last if setting.layout == "channels_last" else self.torch.contiguous_format

    def use(self, setting: Setting) -> None:
        """Set PyTorch's number of threads."""
        if self.torch.get_num_threads() != setting.threads:
            self.torch.set_num_threads(setting.threads)

    def bind(self, x: Any, setting: Setting) -> Call:
        """Return the call: from an array to an array, in inference mode."""
        self.use(setting)
        torch, dtype, memory_format = self.torch, self.dtype, self.memory_format(setting)
        model = self.prepared(x, setting)

        def call() -> Any:
            with torch.inference_mode():
                images = torch.from_numpy(x).to(dtype=dtype, memory_format=memory_format)
                return model(images).float().numpy()

        return call


class CompiledRunner(TorchRunner):
    """``torch.compile`` with frozen weights, at the number of threads that is given: each would be compiled anew."""

    def candidates(self) -> list[Setting]:
        """Return the usual number of threads."""
        return [Setting(self.thread_counts()[0], "channels_last")]

    def prepared(self, x: Any, setting: Setting) -> Any:
        """Return the compiled model; it is compiled for each batch size when it is first called."""
        if not self.models:
            import torch._inductor.config as inductor

            inductor.freezing = True
            model = self.model.to(memory_format=self.memory_format(setting))
            self.models[""] = self.torch.compile(model, dynamic=False)
        return self.models[""]


class NinRunner(TorchRunner):
    """nin's operator: the network of `nin.fuse`, whose weights are only read (`nin.freeze`)."""

    is_plain = False

    def candidates(self) -> list[Setting]:
        """Return every number of threads; the kernels are for channels_last."""
        return [Setting(n, "channels_last") for n in self.thread_counts()]

    def prepared(self, x: Any, setting: Setting) -> Any:
        """Return the network fused for that many images and threads."""
        key = len(x), setting.threads
        if key not in self.models:
            from nin.speed_search.networks import fuse_for

            example = self.torch.from_numpy(x).to(self.dtype, memory_format=self.torch.channels_last)
            self.models[key] = fuse_for(self.model, example)
        return self.models[key]


class OnnxRuntimeRunner(Runner):
    """ONNX Runtime; a session for each number of threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.sessions: dict[int, Any] = {}

    def bind(self, x: Any, setting: Setting) -> Call:
        """Return the call of a session."""
        if setting.threads not in self.sessions:
            self.sessions[setting.threads] = onnxruntime_session(self.spec.path, setting.threads)
        return onnxruntime_call(self.sessions[setting.threads], x)


class OpenVinoRunner(Runner):
    """OpenVINO; compiled for each batch size and number of threads, which is its fastest form."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        import openvino

        self.core = openvino.Core()
        self.requests: dict[Any, Any] = {}

    def bind(self, x: Any, setting: Setting) -> Call:
        """Return the call of an inference request."""
        key = x.shape, setting.threads
        if key not in self.requests:
            self.requests[key] = openvino_request(self.core, self.spec.path, x.shape, self.spec.number, setting.threads)
        return openvino_call(self.requests[key], x)


_RUNNERS: dict[str, type[Runner]] = {
    "eager": TorchRunner,
    "compile": CompiledRunner,
    "nin": NinRunner,
    "onnxruntime": OnnxRuntimeRunner,
    "openvino": OpenVinoRunner,
}


def make_runner(spec: WorkerSpec) -> Runner:
    """Load a network in its engine."""
    return _RUNNERS[spec.engine](spec)
