"""Users' data: the `Population` protocol and readers of text, JSONL, data sets on disk and source code."""
