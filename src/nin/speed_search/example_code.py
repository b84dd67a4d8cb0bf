"""The lines of Python that load a chosen combination and call it."""

from nin.engines.catalog import ENGINES
from nin.engines.sessions import openvino_options
from nin.speed_search.combinations import Combination
from nin.speed_search.runners import Setting
from nin.speed_search.subject import Subject

_TORCH = """
keep_freed_memory()  # glibc's malloc: page faults took up to half of the time
torch.set_num_threads({threads})
network = load_network(HERE, plain={plain}{trust}).to({dtype})
"""

_LOADING = {
    "onnxruntime": """
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession(HERE / "{file}", options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
""",
    "openvino": """
core = openvino.Core()
network = core.read_model(HERE / "{file}")
network.reshape({shape})  # {batch} at a time
request = core.compile_model(network, "CPU", {options}).create_infer_request()
""",
    "eager": _TORCH + "network.to(memory_format=torch.{format})\n",
    "compile": _TORCH
    + """network.to(memory_format=torch.{format})
torch._inductor.config.freezing = True  # the weights only change with the program
network = torch.compile(network, dynamic=False)
""",
    "nin": _TORCH
    + """example = torch.zeros({shape}, dtype={dtype}).to(memory_format=torch.channels_last)
network = fuse_for(network, example)  # {batch} at a time
""",
}

_CALLS = {
    "onnxruntime": "    return session.run(None, {name: images})[0]\n",
    "openvino": "    return request.infer([images], share_inputs=True)[0]\n",
}
_TORCH_CALL = """    with torch.inference_mode():
        x = torch.from_numpy(images).to(dtype={dtype}, memory_format=torch.{format})
        return network(x).float().numpy()
"""

_IMPORTS = {
    "onnxruntime": "import onnxruntime\n",
    "openvino": "import openvino\n",
    "eager": "import torch\n",
    "compile": "import torch\nimport torch._inductor.config\n",
    "nin": "import torch\n",
}
_OWN_IMPORTS = {
    "eager": "from nin.runtime.device import keep_freed_memory\nfrom nin.speed_search.networks import load_network\n",
    "nin": "from nin.runtime.device import keep_freed_memory\n"
    "from nin.speed_search.networks import fuse_for, load_network\n",
}

_PROGRAM = '''"""{title}

    python example.py IMAGE …
"""

import sys
from pathlib import Path

import numpy as np
{imports}
{own_imports}
HERE = Path(__file__).resolve().parent
CLASSES = {classes}
RESIZE = {resize}
{loading}

def scores(pixels):
    """Return the scores (N, classes) of pixels, uint8 {pixels}, as the network was trained on them."""
    mean, std = np.array({mean}).reshape(-1, 1, 1), np.array({std}).reshape(-1, 1, 1)
    images = ((pixels / 255 - mean) / std).astype(np.float32)
{call}

for path in sys.argv[1:]:
    pixels = decode(path, size={size}, channels={channels}, value_range={value_range}, resize=RESIZE).numpy()
    row = scores(np.repeat(pixels[None], {batch}, 0))[0]
    print(path, CLASSES[row.argmax()] if CLASSES else row.argmax())
'''


def example(subject: Subject, combination: Combination, setting: Setting, batch: int, file: str, title: str) -> str:
    """Return a program that loads the files beside it and prints the class of each image on its command line.

    Args:
        subject: the network and its images.
        combination: that is loaded.
        setting: threads and layout.
        batch: images at a time.
        file: name of the file that ONNX Runtime or OpenVINO loads.
        title: first line of the program.
    """
    p, engine = subject.preprocessing, combination.engine
    is_torch = engine not in _CALLS
    shape = [batch, *subject.input_shape]
    values = {
        "threads": setting.threads,
        "format": "channels_last" if setting.layout == "channels_last" else "contiguous_format",
        "dtype": f"torch.{combination.number}",
        "plain": engine != "nin",
        "trust": ", trust=True" if subject.trust else "",
        "file": file,
        "shape": shape,
        "batch": batch,
        "options": openvino_options(combination.number, setting.threads),
    }
    own = _OWN_IMPORTS.get("eager" if engine == "compile" else engine, "")
    return _PROGRAM.format(
        title=f"{title}: {combination.form}, {combination.number}, {ENGINES[engine].title}.",
        imports=_IMPORTS[engine],
        own_imports=f"from nin.data import ResizeOptions, decode  # or any reader that gives the same pixels\n{own}",
        classes=list(subject.classes),
        loading=_LOADING[engine].format(**values),
        pixels=f"({batch}, {', '.join(map(str, subject.input_shape))})",
        mean=list(p.mean),
        std=list(p.std),
        call=_TORCH_CALL.format(**values) if is_torch else _CALLS[engine],
        size=p.size,
        channels=p.channels,
        value_range=p.value_range,
        resize=repr(p.resize),
        batch=batch,
    )
