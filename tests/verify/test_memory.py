"""Blocks of memory serve again when nothing refers to them, and never before."""

import threading

import torch

from superopt.verify.memory import LARGE_BYTES, Blocks, allocator

COUNT = LARGE_BYTES // 4


def tensor(blocks: Blocks, size: int = LARGE_BYTES) -> torch.Tensor:
    return torch.frombuffer(blocks.take(size), dtype=torch.float32)


def test_a_block_serves_again_when_its_tensor_is_gone() -> None:
    blocks = Blocks(4 * LARGE_BYTES)
    first = tensor(blocks)
    address = first.data_ptr()
    del first
    assert blocks.kept_bytes == LARGE_BYTES
    assert tensor(blocks).data_ptr() == address


def test_views_and_arrays_keep_a_block() -> None:
    blocks = Blocks(8 * LARGE_BYTES)
    holders = [tensor(blocks)[3:], tensor(blocks).numpy(), tensor(blocks).detach()]
    assert blocks.kept_bytes == 0
    addresses = {tensor(blocks).data_ptr() for _ in range(4)}
    assert len(addresses) == 1
    del holders
    assert blocks.kept_bytes == 4 * LARGE_BYTES


def test_what_is_kept_is_bounded() -> None:
    blocks = Blocks(3 * LARGE_BYTES)
    held = [tensor(blocks, (i + 1) * LARGE_BYTES) for i in range(3)]
    del held
    assert blocks.kept_bytes <= 3 * LARGE_BYTES


def test_threads_never_share_a_block() -> None:
    blocks = Blocks(64 * LARGE_BYTES)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            mine = tensor(blocks)
            mine[:4] = number
            mine[-4:] = number
            if not bool((mine[:4] == number).all() and (mine[-4:] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_of_a_program_are_not_overwritten_by_the_next_call() -> None:
    make = allocator((COUNT,), torch.float32)
    first, second = make().fill_(1.0), make().fill_(2.0)
    assert bool((first == 1.0).all())
    assert bool((second == 2.0).all())
    assert first.is_contiguous()
