"""Serve artifacts: each row is answered the moment its exit speaks, several models share one budget of memory.

Needs `offramp[serve]`; importing `offramp.runtime` does not import this package. `work` says what the parts hand each
other, and is where to begin.
"""
