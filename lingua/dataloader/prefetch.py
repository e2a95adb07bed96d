"""Run an iterator in a process of its own, a few items ahead.

The items travel through a pipe of which the parent holds only the reading end: when the worker
dies, however it dies, the parent reads to the end and then knows, and never waits for the rest of
a message that nobody will write. (A multiprocessing.Queue would.) What the worker raises is raised
in the parent, after all items that came before it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from lingua.errors import UserError
from lingua.parallel.signals import PARENT_SIGNALS, blocked_parent_signals

ITEM, END, USER_ERROR, ERROR = range(4)


IteratorBuilder = Callable[[], AbstractContextManager[Iterator[Any]]]


@contextmanager
def async_iterator(buffer_size: int, iterator_builder: IteratorBuilder) -> Iterator[Iterator[Any]]:
    """Iterate over what `iterator_builder` (picklable) opens, up to `buffer_size` items ahead."""
    # what setup_torch_distributed chose; forking a process that has threads or CUDA is unsafe
    method = multiprocessing.get_start_method(allow_none=True) or "forkserver"
    context: Any = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    producer = context.Process(
        target=feed_buffer,
        args=(writer, buffer_size, iterator_builder),
        name="data worker",
        daemon=True,
    )
    with blocked_parent_signals():
        producer.start()
    writer.close()
    try:
        yield consume_buffer(producer, reader)
    finally:
        reader.close()
        producer.kill()  # it has nothing to save, and SIGTERM does not reach it
        producer.join()


def consume_buffer(producer: BaseProcess, reader: Connection) -> Iterator[Any]:
    while True:
        try:
            kind, payload = reader.recv()
        except (EOFError, OSError):  # OSError: in the middle of a message
            producer.join()
            code = producer.exitcode
            why = ": killed, most often because memory ran out" if code == -signal.SIGKILL else ""
            raise RuntimeError(
                f"the data worker (pid {producer.pid}) died with exit code {code}{why}"
            ) from None
        if kind == END:
            return
        if kind == USER_ERROR:
            raise UserError(payload)
        if kind == ERROR:
            raise RuntimeError(f"the data worker failed:\n{payload}")
        yield payload


def feed_buffer(writer: Connection, buffer_size: int, iterator_builder: IteratorBuilder) -> None:
    """The worker's main: fill a bounded buffer, which a thread of its own empties into the pipe."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)  # a fork server may not have done so
    threading.Thread(target=exit_with_parent, daemon=True).start()
    buffer: queue.Queue[tuple[int, Any]] = queue.Queue(buffer_size)
    sender = threading.Thread(target=send_all, args=(buffer, writer), daemon=True)
    sender.start()
    try:
        with iterator_builder() as iterator:
            for item in iterator:
                buffer.put((ITEM, item))
        buffer.put((END, None))
    except UserError as error:
        buffer.put((USER_ERROR, str(error)))
    except BaseException:  # a MemoryError, too, must reach the parent
        buffer.put((ERROR, traceback.format_exc()))
    sender.join()


def send_all(buffer: queue.Queue[tuple[int, Any]], writer: Connection) -> None:
    kind = ITEM
    while kind == ITEM:
        kind, payload = buffer.get()
        try:
            writer.send((kind, payload))
        except BrokenPipeError:  # the parent has what it wants
            os._exit(0)
        except Exception:  # an item that cannot be pickled
            kind = ERROR
            writer.send((kind, traceback.format_exc()))
    writer.close()


def exit_with_parent() -> None:
    """No worker outlives its trainer, even one that was killed while the worker reads."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "feed_buffer runs in a child process"
    parent.join()
    os._exit(1)
