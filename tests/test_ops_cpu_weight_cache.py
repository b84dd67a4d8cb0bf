"""Packed weights are fresh in every call, whoever wrote the weights and how."""

import copy
import ctypes
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import nin
from nin.ops.cpu import dispatch, library, weight_cache

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="needs the compiled library")


def write_by_ctypes(weight):
    (ctypes.c_float * weight.numel()).from_address(weight.data_ptr())[weight.numel() - 7] = 5


def write_in_a_process(weight):
    weight.data = weight.detach().clone().share_memory_()
    layer_is_right(weight)  # packs what is shared
    torch.multiprocessing.spawn(write_one, (weight.detach(),), nprocs=1)


def write_one(rank, weight):
    weight[1, 2] = 9


def step(weight, **options):
    optimizer = torch.optim.SGD([weight], lr=0.5, **options)
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 1] = 1
    optimizer.step()


WRITES = {
    "one value through data": lambda w: w.data[3, 5].fill_(4),
    "a filter through data": lambda w: w.data[17].zero_(),
    "all signs": lambda w: w.data.neg_(),
    "filters exchanged": lambda w: w.data.copy_(w.data.flip(0)),
    "channels exchanged": lambda w: w.data.copy_(w.data.roll(1, 1)),
    "rounded": lambda w: w.data.mul_(8).round_().div_(8),
    "low-rank update": lambda w: w.data.add_(torch.outer(torch.ones(32), torch.ones(40))[:, :, None, None]),
    "by NumPy": lambda w: w.detach().numpy().__setitem__((2, 3), 6),
    "by ctypes": write_by_ctypes,
    "by another process": write_in_a_process,
    "other memory": lambda w: setattr(w, "data", torch.randn(32, 40, 1, 1)),
    "other memory by set_": lambda w: w.data.set_(torch.randn(32, 40, 1, 1)),
    "swapped": lambda w: torch.utils.swap_tensors(w, nn.Parameter(torch.randn(32, 40, 1, 1))),
    "from a vector": lambda w: nn.utils.vector_to_parameters(torch.randn(32 * 40), [w]),
    "by a fused optimiser": lambda w: step(w, fused=True),
    "by a foreach optimiser": lambda w: step(w, foreach=True),
    "broadcast": lambda w: w.data.copy_(torch.ones(32, 40, 1, 1)),
}


def layer_is_right(weight):
    x = torch.linspace(-1, 1, 40 * 256).view(1, 40, 16, 16)
    with torch.no_grad():
        wanted = F.conv2d(x.double(), weight.double())
        torch.testing.assert_close(nin.conv1x1(x, weight).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_seen(name):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 40, 1, 1))
    for _ in range(2):
        layer_is_right(weight)
        WRITES[name](weight)
        layer_is_right(weight)


@pytest.mark.parametrize("channels", [33, 192])
def test_every_filter_that_is_set_to_zero_is_seen(channels):
    weight, x = torch.randn(channels, channels, 1, 1), torch.randn(1, channels, 16, 16)
    for filter_ in range(channels):
        nin.conv1x1(x, weight)
        before = weight.data[filter_].clone()
        weight.data[filter_] = 0
        assert not nin.conv1x1(x, weight)[0, filter_].any()
        weight.data[filter_] = before


def test_transformed_weights_are_fresh():
    weight, x = torch.randn(64, 64, 3, 3), torch.randn(4, 64, 16, 16)
    for place in ((0, 0, 0, 0), (63, 63, 2, 2), (31, 7, 1, 0)):
        nin.mlpconv(x, [weight], [None], padding=1, activation=None)
        weight.numpy()[place] += 50
        wanted = F.conv2d(x, weight, padding=1)
        got = nin.mlpconv(x, [weight], [None], padding=1, activation=None)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-2)


def test_weights_in_the_memory_of_others_are_fresh():
    memory = np.random.default_rng(0).normal(size=(32, 40, 1, 1)).astype(np.float32)
    weight = torch.from_numpy(memory)
    layer_is_right(weight)
    memory[31, 39] = 8
    layer_is_right(weight)


def test_gradients_use_the_weights_of_now():
    weights = [nn.Parameter(torch.randn(24, 16, 1, 1)), nn.Parameter(torch.randn(8, 24, 1, 1))]
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    for _ in range(2):
        for weight in weights:
            weight.data.view(-1)[5] += 3
        got = torch.autograd.grad(nin.mlpconv(x, weights, (None, None)).square().sum(), (x, *weights))
        y = F.conv2d(F.conv2d(x, weights[0]).relu(), weights[1]).relu()
        for a, b in zip(got, torch.autograd.grad(y.square().sum(), (x, *weights)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def hashed(data, threads=1):
    array = np.frombuffer(bytearray(data), np.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return weight_cache.hash_bytes(dispatch.KERNELS, (array.ctypes.data, len(array)))[0]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 7, 64, 511, 512, 513, 5000, 131072, 131080])
def test_the_hash_sees_every_bit(isa, size):
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    first = hashed(data)
    assert hashed(data) == first
    places = range(size) if size < 600 else np.random.default_rng(1).choice(size, 200, replace=False)
    others = set()
    for place in places:
        changed = data.copy()
        changed[place] ^= 1 << (place % 8)
        others.add(hashed(changed))
    assert first not in others
    assert len(others) == len(places)


def test_the_hash_sees_what_sums_do_not(isa):
    values = np.ones(4096, np.float32)
    variants = [values, -values, np.zeros_like(values), np.zeros(4095, np.float32), np.tile([1, -1], 2048)]
    variants += [
        np.roll(np.tile([1, -1], 2048), 1),
        *(np.repeat(order, 1024) for order in ([1, 2, 3, 4], [2, 1, 4, 3])),
    ]
    variants += [np.concatenate([values[:n], -values[n : n + 16], values[n + 16 :]]) for n in range(0, 4080, 16)]
    hashes = {hashed(np.asarray(variant, np.float32).tobytes()) for variant in variants}
    assert len(hashes) == len(variants)


@pytest.mark.parametrize("start", ["zeros", "random"])
def test_two_changed_bits_do_not_hide_each_other(isa, start):
    random = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    words = (np.zeros(512, np.float32) if start == "zeros" else random).view(np.uint64)
    pointer, kernels = (words.ctypes.data, words.nbytes), dispatch.KERNELS
    first = weight_cache.hash_bytes(kernels, pointer)[0]

    def hash_with_flipped(place, bits, other, other_bits):
        words[place] ^= bits
        words[other] ^= other_bits
        result = weight_cache.hash_bytes(kernels, pointer)[0]
        words[place] ^= bits
        words[other] ^= other_bits
        return result

    one = np.uint64(1)
    bits = [one << np.uint64(b) for b in range(64)]
    # the same lane of the next blocks, whatever the instruction set; any two bits
    for distance in (8, 16, 32, 64):
        assert all(hash_with_flipped(5, a, 5 + distance, b) != first for a in bits[::9] + bits[31::32] for b in bits)
    # the signs of any two float32
    signs = [(i // 2, bits[31 + 32 * (i % 2)]) for i in range(260)]
    pairs = [(signs[i], signs[j]) for i in range(1, 260, 20) for j in range(i + 1, 260)]
    assert all(hash_with_flipped(*a, *b) != first for a, b in pairs)


def test_the_hash_does_not_depend_on_the_number_of_threads():
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8)
    assert len({hashed(data, threads) for threads in (1, 2, 3)}) == 1


def test_views_of_one_tensor_do_not_fill_the_memory():
    weight_cache._copies.clear()
    base, x = torch.randn(400, 16, 1, 1), torch.randn(1, 16, 30, 30)
    for start in range(380):
        nin.conv1x1(x, base[start : start + 20])
    kept = sum(copy.packed.nbytes for copy in weight_cache._copies.values())
    assert kept < 2 * weight_cache.MAX_COPIED_RATIO * base.nbytes
    del base
    gc.collect()
    assert not weight_cache._copies


def test_constants_are_not_hashed(monkeypatch):
    weight, x = torch.randn(32, 40, 1, 1), torch.randn(1, 40, 16, 16)
    weight_cache.mark_constant(weight)
    nin.conv1x1(x, weight)
    (copy,) = (copy for key, copy in weight_cache._copies.items() if key[0] == weight.data_ptr())
    assert copy.hash is None
    layer_is_right(weight)
    name = id(weight.untyped_storage())
    del weight
    gc.collect()
    assert name not in weight_cache._constants


def frozen_layer():
    """Return a frozen layer whose weights are packed, and a function that calls it and tells whether it is right."""
    torch.manual_seed(0)
    layer, x = nin.freeze(nin.MLPConv(16, (32, 24), kernel_size=3, padding=1).eval()), torch.randn(2, 16, 9, 9)

    def is_right():
        with torch.no_grad():
            wanted = layer.to_sequential()(x)
            return bool((layer(x) - wanted).norm() < 1e-4 * wanted.norm())

    assert is_right()
    assert is_right()
    return layer, is_right


class CountingLibrary:
    """The library, counting the bytes that it is asked to hash."""

    def __init__(self, real, counted):
        self.real, self.counted = real, counted

    def __getattr__(self, name):
        return getattr(self.real, name)

    def nin_hash(self, kernels, blocks, *rest):
        self.counted.append(sum(memoryview(blocks).cast("q")[1::2]))
        return self.real.nin_hash(kernels, blocks, *rest)

    def nin_forward(self, *arguments):
        self.counted.append(sum(memoryview(arguments[-3] or b"").cast("q")[1::2]))
        return self.real.nin_forward(*arguments)


def count_hashed_bytes(monkeypatch):
    counted = []
    monkeypatch.setattr(library, "LIBRARY", CountingLibrary(library.LIBRARY, counted))
    return counted


SEEN_WRITES = {
    "in place": lambda layer: layer.convs[1].weight.mul_(3),
    "through detach": lambda layer: layer.convs[0].weight.detach()[3].fill_(2),
    "initialised": lambda layer: nn.init.normal_(layer.convs[1].weight),
    "loaded": lambda layer: layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}),
    "other memory": lambda layer: setattr(layer.convs[0].weight, "data", torch.randn(32, 16, 3, 3)),
    "another parameter": lambda layer: setattr(layer.convs[0], "weight", nn.Parameter(torch.randn(32, 16, 3, 3))),
    "swapped": lambda layer: torch.utils.swap_tensors(layer.convs[0].weight, nn.Parameter(torch.randn(32, 16, 3, 3))),
    "a plain optimiser": lambda layer: [step(p, fused=False) for p in layer.parameters() if p.dim() == 4],
}


@pytest.mark.parametrize("name", SEEN_WRITES)
def test_a_frozen_layer_sees_what_raises_version_counters(name):
    layer, is_right = frozen_layer()
    for _ in range(2):
        with torch.no_grad():
            SEEN_WRITES[name](layer)
        assert is_right()


def test_a_frozen_layer_is_not_hashed(monkeypatch):
    layer, is_right = frozen_layer()
    counted = count_hashed_bytes(monkeypatch)
    assert is_right()
    assert not sum(counted)
    layer.convs[1].weight.data[3] += 1  # what freeze says it does not see
    assert not is_right()
    assert not sum(counted)


def test_requires_grad_takes_the_promise_back(monkeypatch):
    layer, is_right = frozen_layer()
    assert not any(p.requires_grad for p in layer.parameters())
    layer.requires_grad_(True)
    counted = count_hashed_bytes(monkeypatch)
    assert is_right()
    for switch in (True, False):  # for good
        layer.requires_grad_(switch)
        layer.convs[1].weight.data[3] += 1
        layer.convs[0].weight.data[3] += 1
        assert is_right()
    assert sum(counted) > 0


def test_requires_grad_takes_the_promise_back_where_pytorch_serves():
    layer, x, small = nin.freeze(nin.Conv1x1(64, 64).eval()), torch.randn(1, 64, 32, 32), torch.randn(1, 64, 2, 2)
    calls = {
        "no gradients": lambda: torch.no_grad()(layer)(small),
        "again": lambda: torch.no_grad()(layer)(small),
        "gradients": lambda: layer(small).sum().backward(),
        "transformed": lambda: torch.func.jvp(layer, (small,), (small,)),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(layer)(small),
    }
    for call in calls.values():
        nin.freeze(layer)
        with torch.no_grad():
            layer(small)
            layer(x)
        layer.requires_grad_(True)
        call()
        layer.weight.data.mul_(1.5)
        layer.requires_grad_(False)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)


def test_requires_grad_takes_the_promise_back_for_every_packed_copy():
    layer = nin.freeze(nin.MLPConv(16, (16,), kernel_size=3, padding=1).eval())
    images = [torch.randn(2, 16, *size, requires_grad=True) for size in ((24, 24), (3, 3), (1, 40))]

    def are_right():
        for x in images:
            wanted = layer.to_sequential()(x)
            torch.testing.assert_close(layer(x), wanted, rtol=1e-3, atol=1e-3)
            ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), wanted))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)

    are_right()
    layer.requires_grad_(True)
    layer(images[1])
    layer.requires_grad_(False)
    layer.convs[0].weight.data.mul_(-2)
    are_right()


@pytest.mark.parametrize("move", ["share_memory", "data", "swap", "delete"])
def test_other_tensors_at_the_address_of_a_frozen_weight(move):
    memory, x = np.random.default_rng(0).normal(size=(32, 40, 1, 1)).astype(np.float32), torch.randn(1, 40, 16, 16)
    layer = nin.Conv1x1(40, 32, bias=False).eval()
    layer.weight.data = torch.from_numpy(memory)
    nin.freeze(layer)
    moves = {
        "share_memory": layer.share_memory,
        "data": lambda: setattr(layer.weight, "data", layer.weight.data.clone()),
        "swap": lambda: torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(32, 40, 1, 1))),
        "delete": lambda: delattr(layer, "weight"),
    }
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        moves[move]()
        others = [torch.from_numpy(memory), nn.Parameter(torch.from_numpy(memory), requires_grad=False)]
        for other in others * 2:
            memory *= -2
            for _ in range(2):
                torch.testing.assert_close(nin.conv1x1(x, other), F.conv2d(x, other), rtol=1e-3, atol=1e-3)


def test_another_parameter_in_a_frozen_weights_memory():
    layer, x = nin.freeze(nin.Conv1x1(40, 32, bias=False).eval()), torch.randn(1, 40, 16, 16)
    other = nn.Parameter(layer.weight.data, requires_grad=False)  # with a version counter of its own

    def are_right():
        with torch.no_grad():
            for weight in (other, layer.weight, layer.weight.detach(), layer.weight.view(32, 40, 1, 1)):
                torch.testing.assert_close(nin.conv1x1(x, weight), F.conv2d(x, weight), rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        for _ in range(2):
            nin.conv1x1(x, layer.weight)
        while other._version < layer.weight._version:
            other.mul_(-1.5)
        are_right()
        nin.freeze(layer)
        other.mul_(2)
        are_right()


def test_views_of_a_frozen_weight_are_not_hashed(monkeypatch):
    layer, x = nin.freeze(nin.Conv1x1(40, 32, bias=False).eval()), torch.randn(1, 40, 16, 16)
    with torch.no_grad():
        nin.conv1x1(x, layer.weight)
        counted = count_hashed_bytes(monkeypatch)
        for _ in range(2):
            nin.conv1x1(x, layer.weight.flatten(1)[:, :, None, None])
        assert not sum(counted)
        layer.weight.mul_(2)
        wanted = F.conv2d(x, layer.weight)
        torch.testing.assert_close(nin.conv1x1(x, layer.weight.view(32, 40, 1, 1)), wanted, rtol=1e-4, atol=1e-4)


def test_a_weight_written_to_and_back_while_it_is_packed(monkeypatch):
    weight, pack = torch.randn(32, 40, 1, 1), weight_cache._pack
    before = weight.clone()

    def pack_meanwhile(*arguments, **options):  # what another thread may do
        weight.neg_()
        packed = pack(*arguments, **options)
        weight.copy_(before)
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(weight_cache, "_pack", pack_meanwhile)
        nin.conv1x1(torch.randn(1, 40, 16, 16), weight)
    for _ in range(2):
        layer_is_right(weight)


def test_a_batchnorm_written_to_and_back_while_it_is_folded(monkeypatch):
    from nin.fusion import link

    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU()).eval()
    fused, x, fold = nin.fuse(model).model, torch.randn(2, 8, 12, 12), link._fold_batch_norm
    norm = fused.get_submodule("1")

    def fold_meanwhile(layer):
        norm.weight.data.neg_()
        folded = fold(layer)
        norm.weight.data.neg_()
        return folded

    with torch.no_grad():
        norm.weight.data.fill_(0.7)
        model.load_state_dict(fused.state_dict())
        with monkeypatch.context() as patch:
            patch.setattr(link, "_fold_batch_norm", fold_meanwhile)
            fused(x)
        for _ in range(2):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_freeze_drops_gradients_and_keeps_no_memory():
    layer = nin.MLPConv(16, (32, 24)).eval()
    layer(torch.randn(1, 16, 3, 3)).sum().backward()
    assert nin.freeze(layer) is layer
    assert all(p.grad is None for p in layer.parameters())
    names = {id(p.untyped_storage()) for p in layer.parameters()}
    assert names <= weight_cache._constants.keys()
    layer(torch.randn(1, 16, 3, 3))
    del layer
    gc.collect()
    assert not names & weight_cache._constants.keys()


def test_freeze_refuses_training():
    model = nn.Sequential(nin.Conv1x1(3, 4), nin.Conv1x1(4, 4)).eval()
    model[1].train()
    with pytest.raises(nin.errors.UserError, match="got 1 in training"):
        nin.freeze(model)


def test_parameters_that_share_memory_stay_hashed():
    memory, x = torch.randn(2, 8, 8), torch.randn(1, 8, 20, 20)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 1, bias=False) for _ in range(2))).eval()
    for conv, part in zip(model, memory, strict=True):
        conv.weight.data = part[:, :, None, None]
    nin.freeze(model)
    for _ in range(2):
        wanted = F.conv2d(x, model[0].weight)
        torch.testing.assert_close(nin.conv1x1(x, model[0].weight), wanted, rtol=1e-4, atol=1e-4)
        memory.numpy()[0] += 1


def test_a_frozen_fused_model_sees_writes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU()).eval()
    x = torch.randn(2, 8, 12, 12)
    fused = nin.freeze(nin.fuse(model).model)
    with torch.no_grad():
        for write in (
            lambda: None,
            lambda: fused.get_parameter("0.weight").mul_(2),
            lambda: fused.get_parameter("1.weight").add_(1),
            lambda: fused.get_buffer("1.running_mean").data.add_(1),  # not a parameter, so hashed
        ):
            write()
            model.load_state_dict(fused.state_dict())
            for _ in range(2):
                torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_no_compiled_library_no_hash():
    assert library.LIBRARY is not None
    assert weight_cache.hash_tensors(dispatch.KERNELS, [torch.ones(2, device="meta")]) is None
    assert weight_cache.hash_tensors(dispatch.KERNELS, [torch.ones(4, 4)[:, 1]]) is None
    a, b = torch.ones(6), torch.ones(2, 3)
    assert weight_cache.hash_tensors(dispatch.KERNELS, [a]) != weight_cache.hash_tensors(dispatch.KERNELS, [b])


# -- what people do with networks that have answered ------------------------------------------------------------


def answers_rightly(layer, x):
    with torch.no_grad():
        return bool((layer(x) - layer.to_sequential()(x)).norm() < 1e-4 * layer.to_sequential()(x).norm())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: pickle.loads(ForkingPickler.dumps(m))]
)
def test_copies_of_a_frozen_layer_are_not_frozen(copied):
    layer, is_right = frozen_layer()
    other, x = copied(layer), torch.randn(2, 16, 9, 9)
    if not other.convs[0].weight.is_shared():  # the memory of both, then
        for conv in other.convs:
            conv.weight.data.mul_(3)
            assert answers_rightly(other, x)
    with torch.no_grad():
        layer.convs[0].weight.mul_(2)
    assert answers_rightly(other, x)
    assert is_right()


def test_frozen_layers_exchange_their_weights():
    x, layers = torch.randn(2, 16, 9, 9), [frozen_layer()[0] for _ in range(2)]
    with torch.no_grad():
        layers[1].convs[0].weight.mul_(2)
    for _ in range(2):
        for ours, theirs in zip(*(layer.parameters() for layer in layers), strict=True):
            torch.utils.swap_tensors(ours, theirs)
        for layer in layers:
            assert answers_rightly(layer, x)
            with torch.no_grad():
                layer.convs[1].weight.mul_(-1.5)
            assert all(answers_rightly(other, x) for other in layers)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_weights_in_mapped_files(tmp_path, kind):
    source, layer, x = nin.MLPConv(16, (32, 24)), nin.MLPConv(16, (32, 24)).eval(), torch.randn(2, 16, 9, 9)
    if kind == "torch":
        torch.save(source.state_dict(), tmp_path / "weights")
        state = torch.load(tmp_path / "weights", mmap=True)
    else:
        safetensors.torch.save_file(source.state_dict(), tmp_path / "weights")
        state = safetensors.torch.load_file(tmp_path / "weights")
    layer.load_state_dict(state, assign=True)
    for write in (lambda: None, lambda: layer.convs[0].weight.data[3].add_(2), lambda: nin.freeze(layer)):
        write()
        for _ in range(2):
            assert answers_rightly(layer, x)
    with torch.no_grad():
        layer.convs[1].weight.mul_(2)
    assert answers_rightly(layer, x)


def test_a_file_that_is_written_to_under_its_weights(tmp_path):
    np.random.default_rng(0).normal(size=32 * 40).astype(np.float32).tofile(tmp_path / "weights")
    weight = torch.from_numpy(np.memmap(tmp_path / "weights", np.float32, "r+", shape=(32, 40, 1, 1)))
    for _ in range(2):
        layer_is_right(weight)
        with (tmp_path / "weights").open("r+b") as file:
            file.write(np.full(64, 5, np.float32).tobytes())
        layer_is_right(weight)
        weight.neg_()


@pytest.mark.parametrize("freezes", [False, True])
def test_threads_that_call_one_layer(freezes):
    layer = nin.MLPConv(16, (32, 24), kernel_size=3, padding=1).eval()
    if freezes:
        nin.freeze(layer)
    images = [torch.randn(1 + i % 2, 16, 9 + i % 3, 12) for i in range(80)]
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda x: answers_rightly(layer, x), images))


def test_another_number_of_threads_gives_the_same():
    layer, x, before = frozen_layer()[0], torch.randn(2, 16, 9, 9), torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            results += [layer(x), layer(x)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)
