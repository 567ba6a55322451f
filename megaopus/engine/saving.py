"""megatron's sharded checkpoints written by the training process itself.

megatron-core writes through forked workers and a manager process. A signal meant for the job reaches those too (Slurm
and shells signal whole process groups): the manager dies, and with it the very save that SIGTERM asked for. Forking a
process with threads and a CUDA context is fragile as well, and a killed job leaves its manager behind.
"""

from __future__ import annotations

import queue
from functools import cache, partial
from pathlib import Path
from typing import Any


@cache
def in_process_strategy() -> Any:
    """A sharded save strategy for ``dist_checkpointing.save``; same files, no other process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    def write(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue) -> None:
        """Write this rank's buckets one after another; results, or the first exception, go to ``results``."""
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            outcome: queue.Queue = queue.Queue()
            count: queue.Queue = queue.Queue()
            count.put(index)  # megatron's worker takes it to say that it has ended
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, count, True)
            written[index] = outcome.get_nowait()[1]
            if isinstance(written[index], Exception):
                results.put(written[index])
                return
        results.put(written)

    class InProcessSave(TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
            filesystem_async._results_queue = queue.Queue()  # megatron would start a manager process for it
            request = self.async_save(sharded_state_dict, checkpoint_dir)
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(write, request.async_fn.args[0]))
            request.execute_sync()

    return InProcessSave("torch_dist", 1, thread_count=1)
