"""The HTTP server: OpenAI's API over the engine, and a chat page.

A request passes `gate` (identity, keys, limits, log), its route in `app`, which turns the body of `schema` into engine
requests, and `worker`, the one thread that owns the engine; tokens come back as text through `chat` or `completions`.
"""
