"""Serve artifacts: each row is answered the moment its exit speaks, several models share one budget of memory.

Needs `offramp[serve]`; nothing outside this package imports it. `work` says what the parts hand each other, and is
where to begin:

    command, app, door, guard     the process, its routes, who is let in
    stream, frames                WebSocket: one message per row
    infer                         Open Inference Protocol v2
    engine, queues, ledger        rows of many requests share a stage's batch
    host, shelf, loader           which stages are in memory
    recording, record_store       a sample of rows with the backbone's own answer
    metrics, page.html            what all of it reports

A recording is read back with what is exported here.
"""

from __future__ import annotations

from .record_reading import Exported, Recorded, export, live_disagreement, read_recording

__all__ = ["Exported", "Recorded", "export", "live_disagreement", "read_recording"]
