"""Hears of changes in folders at once and without polling: inotify, through ctypes, on the running loop.

Where the kernel has no watch left, no event is ever set: whoever waits for one also looks now and then.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import struct
from pathlib import Path

_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x80, 0x100
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_HEADER = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)

log = logging.getLogger(__name__)


class FolderWatch:
    """One inotify descriptor for all attempts of a node. Use it on one event loop."""

    def __init__(self) -> None:
        self._descriptor = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._changed: dict[int, set[asyncio.Event]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)

    def watch(self, folder: Path, changed: asyncio.Event) -> None:
        """Sets `changed` whenever a file in the folder is made, replaced or written to."""
        number = _libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE)
        if number < 0:
            problem = ctypes.get_errno()
            log.warning("folder is not watched", extra={"folder": str(folder), "reason": errno.errorcode[problem]})
            return
        self._changed.setdefault(number, set()).add(changed)

    def forget(self, changed: asyncio.Event) -> None:
        """Stops setting `changed`."""
        for number, events in list(self._changed.items()):
            events.discard(changed)
            if not events:
                _libc.inotify_rm_watch(self._descriptor, number)
                del self._changed[number]

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            number, _, _, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size + length
            # -1: the queue overflowed, and anybody may have missed something.
            numbers = self._changed if number == -1 else (number,)
            for event in (event for each in numbers for event in self._changed.get(each, ())):
                event.set()
