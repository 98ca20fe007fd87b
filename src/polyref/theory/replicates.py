"""Many independent replicates of one experiment, in chunks over threads, with results that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from polyref.errors import ConfigError

Chunk = Callable[[torch.Generator, int], dict[str, Tensor]]
"""(generator, size) -> tensors by name, each with `size` replicates on the first axis."""


def map_replicates(
    function: Chunk,
    replicates: int,
    seed: int,
    *,
    chunk: int = 256,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """`function` on chunks of `chunk` replicates (the last one smaller), its tensors concatenated in order of chunk.

    Each chunk has a generator of its own, seeded from (seed, index of the chunk), and torch runs each chunk on one thread: the
    result depends on `seed` (>= 0) and `chunk`, and on neither `threads` nor the order in which chunks finish. While it runs,
    torch's intra-op threads are set to 1 for the process, and put back at the end. torch releases the interpreter lock inside
    its operations: threads pay when a chunk is large enough for these to dominate, and small enough to stay in cache.
    `progress(done, total)`, in replicates, is called from the calling thread. An error in a chunk cancels those not begun and
    is raised once those that run have ended; Ctrl-C waits for none of them. ConfigError for sizes below 1, or tensors that do
    not hold `size` replicates.
    """
    if min(replicates, chunk, threads) < 1 or seed < 0:
        raise ConfigError(
            f"replicates {replicates}, chunk {chunk}, threads {threads}, seed {seed}",
            fix="give at least 1 of each, and a seed >= 0",
        )
    sizes = [min(chunk, replicates - start) for start in range(0, replicates, chunk)]

    def run(index: int) -> dict[str, Tensor]:
        torch.set_num_threads(1)
        results = function(_generator(seed, index), sizes[index])
        for name, values in results.items():
            if values.dim() == 0 or values.shape[0] != sizes[index]:
                raise ConfigError(f"{tuple(values.shape)} does not hold {sizes[index]} replicates", where=f"result {name!r}")
        return results

    pool = ThreadPoolExecutor(threads, thread_name_prefix="replicates")
    with _one_intra_op_thread():
        futures = {pool.submit(run, index): index for index in range(len(sizes))}
        done = 0
        try:
            for future in as_completed(futures):
                future.result()
                done += sizes[futures[future]]
                if progress is not None:
                    progress(done, replicates)
        except BaseException as error:
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise
        pool.shutdown()
    return _concatenated(list(futures))


def _concatenated(futures: list[Future[dict[str, Tensor]]]) -> dict[str, Tensor]:
    parts = [future.result() for future in futures]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _generator(seed: int, index: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


@contextmanager
def _one_intra_op_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
