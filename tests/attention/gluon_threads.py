# ruff: noqa: ARG001, ARG005 - the names are those of Gluon
"""Runs Gluon kernels without a GPU: a thread a partition, barriers by phase, copies and products that take their time.

A copy spoils its slot at once and fills it later; a product reads its operands when it starts and again when it is
waited for, and they must be the same. Registers, layouts and the order within a warp are not looked at.
"""

import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SECONDS = 20.0  # without progress, after which partitions are taken to wait for one another


class Pointer:
    def __init__(self, data: Tensor, offset: Any = 0):
        self.data, self.offset = data, offset
        self.dtype = types.SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.data, self.offset + offset)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset = torch.as_tensor(self.offset).long()
        mask = torch.as_tensor(True if mask is None else mask).expand(offset.shape)
        assert bool(((offset >= 0) & (offset < self.data.numel()) | ~mask).all()), "read or written out of bounds"
        return offset, mask


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    offset, mask = pointer.places(mask)
    return torch.where(
        mask, pointer.data[torch.where(mask, offset, 0)], torch.as_tensor(other, dtype=pointer.data.dtype)
    )


def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    offset, mask = pointer.places(mask)
    pointer.data[offset[mask]] = value.expand(offset.shape)[mask].to(pointer.data.dtype)


class Shared:
    def __init__(self, data: Tensor):
        self.data, self.shape, self.dtype = data, data.shape, data.dtype
        self.index = lambda i: Shared(data[int(i)])
        self.reshape = lambda shape: Shared(data.view(shape))
        self.permute = lambda order: Shared(data.permute(order))
        self.slice = lambda start, length, dim: Shared(data.narrow(dim, start, length))
        self.store = data.copy_


class Barrier:
    def __init__(self, count: int = 0):
        self.count = self.missing = count
        self.phase = self.bytes = 0
        self.changed = threading.Condition()

    def change(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != int(parity), SECONDS)
        assert done, "deadlock: a barrier's phase never ends"


def arrive(barrier: Barrier, count: int) -> None:
    barrier.change(count, 0)
    time.sleep(0.002)  # so that what waited goes on first: a slot that is left too early is spoiled


def copy_tile(desc: Any, place: list, barrier: Barrier, slot: Shared) -> None:
    slot.data.fill_(float("nan"))
    place = [int(x) for x in place]
    assert list(slot.shape) == list(desc.block_shape)

    def copy() -> None:
        box = torch.zeros(desc.block_shape, dtype=slot.dtype)
        source = desc.base.as_strided(desc.shape, desc.strides)
        inside = [slice(x, x + n) for x, n in zip(place, desc.block_shape, strict=True)]
        part = source[tuple(inside)]
        box[tuple(slice(0, n) for n in part.shape)] = part
        slot.data.copy_(box)
        barrier.change(0, -slot.data.nbytes)

    threading.Timer(random.uniform(0.0, 0.02), copy).start()  # in any order


class Product:
    started = threading.local()

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool):
        self.operands = a.data if isinstance(a, Shared) else a, b.data
        self.acc = acc if use_acc else torch.zeros_like(acc)
        self.early = self.value()
        Product.started.__dict__.setdefault("queue", []).append(self)

    def value(self) -> Tensor:
        a, b = (x.float() for x in self.operands)
        return self.acc + a @ b


def mma(a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    return product if is_async else mma_wait(0, [product])


def mma_wait(outstanding: int, deps: list) -> Any:
    queue = Product.started.queue
    assert all(product not in queue[len(queue) - outstanding :] for product in deps), "used before it is waited for"
    del queue[: len(queue) - outstanding]
    (product,) = deps
    assert torch.equal(product.early.nan_to_num(7.0), product.value().nan_to_num(7.0)), "operands changed under way"
    return product.early


def larger(x: Any, y: Any) -> Tensor:
    return torch.fmax(torch.as_tensor(x), torch.as_tensor(y))


def smaller(x: Any, y: Any) -> Tensor:
    return torch.fmin(torch.as_tensor(x), torch.as_tensor(y))


def warp_specialize(partitions: list, warps: list, registers: list) -> None:
    errors: list[BaseException] = []

    def run(function: Callable, arguments: tuple) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if errors:
        raise errors[0]


def allocate(dtype: Any, shape: list, layout: Any) -> Any:
    if dtype != torch.int64:
        return Shared(torch.full(shape, float("nan"), dtype=dtype))
    bars = [Barrier() for _ in range(shape[0])]
    return bars[0] if len(shape) == 1 else types.SimpleNamespace(index=lambda i: bars[int(i)])


class Kernel:
    """The kernel of that name in a module, launched as `kernel[grid](...)`."""

    def __init__(self, module: types.ModuleType, name: str):
        def layout(*_: Any) -> None: ...

        language = types.SimpleNamespace(
            **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "exp2", "log2")},
            **dict.fromkeys(("NVMMADistributedLayout", "BlockedLayout", "SliceLayout", "DotOperandLayout"), layout),
            NVMMASharedLayout=layout,
            program_id=lambda axis: torch.tensor(self.program),
            static_range=range,
            cdiv=lambda x, y: (x + y - 1) // y,
            arange=lambda begin, end, layout: torch.arange(begin, end, dtype=torch.int32),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            where=lambda m, x, y: torch.where(torch.as_tensor(m), x, y),
            convert_layout=lambda x, layout: x,
            multiple_of=lambda x, size: x,
            max=lambda x, axis: x.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(axis),
            min=lambda x, axis: x.amin(axis),
            sum=lambda x, axis: x.sum(axis),
            maximum=larger,
            minimum=smaller,
            load=load,
            store=store,
            allocate_shared_memory=allocate,
            warp_specialize=warp_specialize,
        )
        barriers = types.SimpleNamespace(
            MBarrierLayout=layout,
            init=lambda barrier, count: barrier.__init__(count),
            arrive=arrive,
            expect=lambda barrier, size: barrier.change(1, size),
            wait=lambda barrier, parity: barrier.wait(parity),
        )
        products = types.SimpleNamespace(
            warpgroup_mma=mma, warpgroup_mma_wait=lambda n, deps: mma_wait(n, deps), fence_async_shared=lambda: None
        )
        names: dict[str, Any] = {"gl": language, "tl": language, "mbarrier": barriers, "hopper": products}
        names["_copy_tile"] = copy_tile
        for key, value in vars(module).items():
            if key not in names and hasattr(value, "fn"):
                names[key] = types.FunctionType(value.fn.__code__, names)
            elif key not in names and type(value).__name__ == "constexpr":
                names[key] = value.value
        self.function, self.program = names[name], 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(num_warps: int, **arguments: Any) -> None:
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    length = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
                    arguments[name] = Pointer(value.as_strided((length,), (1,)))
                elif isinstance(value, int) and not name.isupper():
                    arguments[name] = torch.tensor(value)
            for self.program in range(grid[0]):
                self.function(**arguments)

        return launch
