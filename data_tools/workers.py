"""What worker processes have in common: none outlives the process that started it."""

import os
import threading
from multiprocessing import connection, parent_process


def die_with_parent() -> None:
    """End this process as soon as its parent is gone, be it killed."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def stop_if_orphan() -> None:
    """End this process if the one that started it is gone."""
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
