"""One worker: a router process that its parent has started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Sequence

from vllm_pd.errors import PDError
from vllm_pd.router import serving
from vllm_pd.router.workers.board import Board
from vllm_pd.router.workers.shared import Shared

logger = logging.getLogger(__name__)


def run(link_fd: int, board_fd: int, listen_fds: Sequence[int]) -> int:
    """Serve until the parent says so or is gone.

    Args:
        link_fd: socket to the parent.
        board_fd: memory that the workers share.
        listen_fds: sockets to listen on.

    Returns:
        The process's exit code.
    """
    # Ctrl-C reaches all processes of a terminal; the parent tells when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with serving.prepared() as runner:
        return runner.run(_work(link_fd, board_fd, [socket.socket(fileno=fd) for fd in listen_fds]))


async def _work(link_fd: int, board_fd: int, sockets: Sequence[socket.socket]) -> int:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=link_fd))
    shared = Shared(reader, writer, stop)
    try:
        start = await shared.start()
        shared.use_board(Board(board_fd, start.config.workers, start.index))
        await serving.serve(start.config, stop, shared=shared, sockets=sockets)
    except PDError as exc:
        await shared.fail(str(exc))
        return 1
    finally:
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()
    return 0
