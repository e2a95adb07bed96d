"""Run an iterator in a worker process, a few items ahead.

The parent holds only the reading end of a pipe. If the worker dies, the parent reads to the end of
the pipe and raises; with a multiprocessing.Queue it could wait forever for the rest of a message.
An error in the worker is raised in the parent, after all items that came before it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

from lingua.errors import UserError
from lingua.parallel.signals import PARENT_SIGNALS, blocked_parent_signals

ITEM, END, USER_ERROR, ERROR = range(4)

IteratorBuilder = Callable[[], AbstractContextManager[Iterator[Any]]]


@contextmanager
def async_iterator(buffer_size: int, iterator_builder: IteratorBuilder) -> Iterator[Iterator[Any]]:
    """Run the iterator of `iterator_builder` (picklable) in a worker, `buffer_size` items ahead."""
    # The method that setup_torch_distributed chose; forking is unsafe with threads or CUDA.
    method = multiprocessing.get_start_method(allow_none=True) or "forkserver"
    context: Any = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    producer = context.Process(
        target=feed_buffer,
        args=(writer, buffer_size, iterator_builder),
        name="data worker",
        daemon=True,
    )
    needs_main = method == "fork" or b"__main__" in bytes(ForkingPickler.dumps(iterator_builder))
    with blocked_parent_signals(), nullcontext() if needs_main else hidden_main():
        producer.start()
    writer.close()
    try:
        yield consume_buffer(producer, reader)
    finally:
        reader.close()
        producer.kill()  # it has nothing to save, and it blocks SIGTERM
        producer.join()


@contextmanager
def hidden_main() -> Iterator[None]:
    """Start processes that don't import the main program: the trainer's takes seconds."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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
    """Run the worker: fill a bounded buffer that a thread sends through the pipe."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)  # not inherited from a fork server
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
    except BaseException:  # the parent needs to see a MemoryError too
        buffer.put((ERROR, traceback.format_exc()))
    sender.join()


def send_all(buffer: queue.Queue[tuple[int, Any]], writer: Connection) -> None:
    kind = ITEM
    while kind == ITEM:
        kind, payload = buffer.get()
        try:
            writer.send((kind, payload))
        except BrokenPipeError:  # the parent has closed the iterator
            os._exit(0)
        except Exception:  # an item that cannot be pickled
            kind = ERROR
            writer.send((kind, traceback.format_exc()))
    writer.close()


def exit_with_parent() -> None:
    """Exit when the parent does, even if the parent is killed while this process reads."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "feed_buffer runs in a child process"
    parent.join()
    os._exit(1)
