"""Where and how the work is done: one worker, many of them, their chunks, nodes and devices."""
